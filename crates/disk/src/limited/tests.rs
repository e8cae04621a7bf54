use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::testing::{Image, buffers, pattern, read, write};
use crate::{Buffers, Extent, run};

/// Reads all of it at once; the numbers of the reads in the order in which they are done come over the channel.
fn read_blocks(disk: &Arc<dyn BlockDevice>, count: u64) -> mpsc::Receiver<(u64, Result<(), IoError>)> {
    let (sender, receiver) = mpsc::channel();
    for i in 0..count {
        let sender = sender.clone();
        let done = Box::new(move |result| sender.send((i, result)).unwrap());
        let operation = Operation::Read { offset: i * 512, buffers: blank() };
        disk.submit(Request { operation, done });
    }
    disk.kick();
    receiver
}

fn blank() -> Buffers {
    buffers(&[0; 512])
}

#[test]
fn operations_pass_in_order_at_their_rate() {
    let image = Image::new(&pattern(1 << 16, 1));
    let disk = image.open(",iops=20");
    let start = Instant::now();
    let order: Vec<u64> = read_blocks(&disk, 30).iter().map(|(i, result)| (result.unwrap(), i).1).collect();
    assert_eq!(order, (0..30).collect::<Vec<_>>());
    // Twenty at once, ten more in half a second.
    assert!(start.elapsed() >= Duration::from_millis(480), "{:?}", start.elapsed());
    // An operation of any kind counts.
    run(&disk, Operation::Flush).unwrap();
    run(&disk, Operation::Discard(vec![Extent { offset: 0, len: 512 }])).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(580), "{:?}", start.elapsed());
}

#[test]
fn bytes_pass_at_their_rate_and_a_large_piece_delays_the_next() {
    let image = Image::new(&vec![0; 1 << 20]);
    let disk = image.open(",bps=100K");
    let start = Instant::now();
    write(&disk, 0, &pattern(150 << 10, 2)).unwrap();
    assert!(start.elapsed() < Duration::from_secs(5), "it passes at once, into debt");
    read(&disk, 0, 512).unwrap();
    // 153600 bytes were taken of 100000.
    assert!(start.elapsed() >= Duration::from_millis(530), "{:?}", start.elapsed());
    assert_eq!(image.bytes()[..150 << 10], pattern(150 << 10, 2));
    let zero =
        Operation::WriteZeroes { extent: Extent { offset: 0, len: 512 }, deallocate: false, durable: false };
    run(&disk, zero).unwrap();
    assert_eq!(image.bytes()[..512], [0; 512]);
}

#[test]
fn end_of_the_disk_lets_through_what_waits() {
    let image = Image::new(&pattern(1 << 16, 1));
    let disk = image.open(",iops=1");
    let start = Instant::now();
    let ends = read_blocks(&disk, 100);
    drop(disk);
    assert_eq!(ends.iter().filter(|(_, result)| result.is_ok()).count(), 100);
    assert!(start.elapsed() < Duration::from_secs(20), "not a hundred seconds");
}

#[test]
fn what_waits_can_be_given_up_and_the_disk_goes_on() {
    let image = Image::new(&pattern(1 << 16, 1));
    let disk = image.open(",iops=5");
    let ends = read_blocks(&disk, 100);
    disk.abandon();
    let given_up = ends.iter().filter(|(_, result)| *result == Err(IoError::Abandoned)).count();
    assert!((80..=95).contains(&given_up), "{given_up}");
    assert_eq!(read(&disk, 512, 512).unwrap(), pattern(1 << 16, 1)[512..1024]);
}
