use std::io::IoSlice;
use std::sync::Arc;
use std::thread::JoinHandle;

use ringfence_share::{Link, Server, ShareSpec};

use super::*;
use crate::virtio::testing::{DATA, Driver};

const REQUESTS: u16 = 1;
const ANSWER: u64 = DATA + 0x10_0000;

/// A device and the folder behind it.
struct Lab {
    driver: Driver,
    folder: tempfile::TempDir,
    told: Arc<Mutex<Vec<String>>>,
    serving: Option<JoinHandle<()>>,
    other: Link,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (link, other) = Link::pair().unwrap();
        let spec = ShareSpec { folder: folder.path().to_owned(), tag: "t".into(), read_only: false };
        let (server, served) = (Server::new(&spec).unwrap(), other.try_clone().unwrap());
        let serving = std::thread::spawn(move || ringfence_share::serve(&served, &server).unwrap());
        let told: Arc<Mutex<Vec<String>>> = Arc::default();
        let teller = Arc::clone(&told);
        let reporter = Arc::new(move |text| lock(&teller).push(text));
        let device = Share::new(ShareConfig { tag: "data".into(), link, reporter }).unwrap();
        let driver = Driver::running(Arc::new(device), 0, 2);
        Self { driver, folder, told, serving: Some(serving), other }
    }

    fn put(&self, opcode: u32, node: u64, body: &[u8]) -> u32 {
        let len = (40 + body.len()) as u32;
        let mut request = len.to_le_bytes().to_vec();
        request.extend(opcode.to_le_bytes());
        request.extend(77_u64.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend([0; 16]);
        request.extend(body);
        self.driver.put(DATA, &request);
        len
    }

    /// Asks and gives error and answer.
    fn ask(&self, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        let len = self.put(opcode, node, body);
        // Header and rest in two buffers each, as Linux has them.
        self.driver.submit(
            REQUESTS,
            &[
                (DATA, 40, false),
                (DATA + 40, len - 40, false),
                (ANSWER, 16, true),
                (ANSWER + 16, 1 << 18, true),
            ],
        );
        self.answer()
    }

    fn answer(&self) -> (i32, Vec<u8>) {
        let written = self.driver.wait_for(REQUESTS) as usize;
        let answer = self.driver.get(ANSWER, written);
        assert_eq!(answer[..4], (written as u32).to_le_bytes());
        assert_eq!(answer[8..16], 77_u64.to_le_bytes());
        (i32::from_le_bytes(answer[4..8].try_into().unwrap()), answer[16..].to_vec())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.other.shutdown();
        if let Some(serving) = self.serving.take() {
            serving.join().unwrap();
        }
    }
}

const INIT: u32 = 26;
const CREATE: u32 = 35;
const WRITE: u32 = 16;
const READ: u32 = 15;

fn init() -> Vec<u8> {
    [7_u32, 37, 0, u32::MAX].iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// `struct fuse_write_in` and data, or `struct fuse_read_in`.
fn access(handle: &[u8], size: u32, data: &[u8]) -> Vec<u8> {
    [handle, &[0; 8], &size.to_le_bytes(), &[0; 20], data].concat()
}

#[test]
fn configuration_has_tag_and_one_request_queue() {
    let lab = Lab::new();
    let config: [u8; 40] = lab.driver.config(0);
    assert_eq!((&config[..5], &config[36..]), (&b"data\0"[..], &[1, 0, 0, 0][..]));
}

#[test]
fn file_is_made_written_and_read() {
    let lab = Lab::new();
    assert_eq!(lab.ask(INIT, 0, &init()).0, 0);
    let body = [&[2, 0, 0, 0, 0xa4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], b"name\0"].concat();
    let (error, made) = lab.ask(CREATE, 1, &body);
    assert_eq!(error, 0);
    let handle = &made[128..136];
    let data: Vec<u8> = (0..128 << 10).map(|i| (i % 241) as u8).collect();
    let (error, written) = lab.ask(WRITE, 0, &access(handle, data.len() as u32, &data));
    assert_eq!((error, &written[..4]), (0, &(data.len() as u32).to_le_bytes()[..]));
    assert_eq!(std::fs::read(lab.folder.path().join("name")).unwrap(), data);
    let (error, read) = lab.ask(READ, 0, &access(handle, 128 << 10, &[]));
    assert!(error == 0 && read == data);
    assert!(lock(&lab.told).is_empty());
}

#[test]
fn requests_of_impossible_lengths_are_refused_one_by_one() {
    let lab = Lab::new();
    assert_eq!(lab.ask(INIT, 0, &init()).0, 0);
    // Longer than any: the device says so itself.
    lab.put(READ, 1, &[]);
    lab.driver.submit(REQUESTS, &[(DATA, 4 << 20, false), (ANSWER, 100, true)]);
    assert_eq!(lab.answer().0, -Errno::INVAL.raw_os_error());
    // Nothing to read, no room for an answer, a header that is cut.
    for (buffers, written) in [
        (&[(ANSWER, 100, true)][..], 16),
        (&[(DATA, 40, false)][..], 0),
        (&[(DATA, 4 << 20, false), (ANSWER, 15, true)][..], 0),
        (&[(DATA, 39, false), (ANSWER, 100, true)][..], 16),
        (&[(DATA, 40, false), (ANSWER, 15, true)][..], 0),
    ] {
        lab.driver.submit(REQUESTS, buffers);
        assert_eq!(lab.driver.wait_for(REQUESTS), written, "{buffers:?}");
    }
    assert_eq!(lab.ask(INIT, 0, &init()).0, 0, "and goes on");
    assert!(lock(&lab.driver.told).is_empty());
}

#[test]
fn forgetting_needs_no_answer_on_the_urgent_queue() {
    let lab = Lab::new();
    let len = lab.put(2, 5, &1_u64.to_le_bytes());
    lab.driver.submit(0, &[(DATA, len, false)]);
    assert_eq!(lab.driver.wait_for(0), 0);
}

#[test]
fn all_fails_after_the_process_has_ended_and_the_machine_lives() {
    let mut lab = Lab::new();
    assert_eq!(lab.ask(INIT, 0, &init()).0, 0);
    lab.other.shutdown();
    lab.serving.take().unwrap().join().unwrap();
    lab.driver.wait("the message", || !lock(&lab.told).is_empty());
    assert_eq!(lab.ask(INIT, 0, &init()).0, -Errno::IO.raw_os_error());
    assert!(lock(&lab.told).len() == 1 && lock(&lab.told)[0].contains("data"));
    lab.driver.start(0, 2);
    assert_eq!(lab.ask(INIT, 0, &init()).0, -Errno::IO.raw_os_error());
}

#[test]
fn request_that_is_never_answered_fails_when_the_process_ends() {
    let (link, other) = Link::pair().unwrap();
    let told: Arc<Mutex<Vec<String>>> = Arc::default();
    let teller = Arc::clone(&told);
    let reporter = Arc::new(move |text| lock(&teller).push(text));
    let device = Share::new(ShareConfig { tag: "x".into(), link, reporter }).unwrap();
    let driver = Driver::running(Arc::new(device), 0, 2);
    driver.submit(REQUESTS, &[(DATA, 40, false), (ANSWER, 100, true)]);
    let mut request = [0; 100];
    assert_eq!(other.receive(&mut request, true).unwrap(), Some(48));
    assert_eq!(driver.take(REQUESTS), None);
    // Answers to what nobody asked, and messages that are none, change nothing.
    for message in [&[9, 9, 9, 9, 1, 2][..], &[1]] {
        other.send(&[IoSlice::new(message)]).unwrap();
    }
    drop(other);
    assert_eq!(driver.wait_for(REQUESTS), 16);
}

#[test]
fn full_link_holds_requests_back_and_loses_none() {
    let (link, other) = Link::pair().unwrap();
    let device = Share::new(ShareConfig { tag: "x".into(), link, reporter: Arc::new(|_| ()) }).unwrap();
    let driver = Driver::running(Arc::new(device), 0, 2);
    for _ in 0..4 {
        driver.submit(REQUESTS, &[(DATA, 128 << 10, false), (ANSWER, 100, true)]);
    }
    let mut buffer = vec![0; 1 << 20];
    for _ in 0..4 {
        let len = other.receive(&mut buffer, true).unwrap().unwrap();
        assert_eq!(len, (128 << 10) + HEAD);
        let mut answer = buffer[..NUMBER].to_vec();
        answer.extend([0; 20]);
        other.send(&[IoSlice::new(&answer)]).unwrap();
        assert_eq!(driver.wait_for(REQUESTS), 20);
    }
}
