//! A process behind the card that does what it likes with the link's memory.

use std::os::fd::{AsFd, OwnedFd};

use ringfence_memory::SharedMemory;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::*;

/// A card whose link is in memory that another process has made, which does what it likes with it.
struct Beside {
    driver: Driver,
    told: Arc<Mutex<Vec<String>>>,
    memory: SharedMemory,
    socket: OwnedFd,
}

impl Beside {
    fn new() -> Self {
        let (mut link, socket) = Link::pair().unwrap();
        // What the process of the link would be given: a page of words, and two rings.
        let (memory, file) = SharedMemory::create("test", 4096 + 2 * (512 << 10)).unwrap();
        let (socket, files) = (socket.into_socket(), [file.as_fd()]);
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
        let message = [io::IoSlice::new(&[0x82])];
        rustix::net::sendmsg(&socket, &message, &mut ancillary, SendFlags::empty()).unwrap();
        link.take_rings(MAX_MESSAGE).unwrap();
        let told: Arc<Mutex<Vec<String>>> = Arc::default();
        let teller = Arc::clone(&told);
        let reporter: Reporter = Arc::new(move |text| lock(&teller).push(text));
        let config = NetConfig { mac: [2; 6], mtu: 1500, pairs: 1, link, reporter };
        let driver = Driver::running(Arc::new(Net::new(config).unwrap()), feature::ALL, 2);
        Self { driver, told, memory, socket }
    }

    fn ring(&self) {
        // The device may have hung up already.
        let _ = rustix::net::send(&self.socket, &[0], SendFlags::NOSIGNAL);
    }

    /// The link must be down, and why was told once; and the guest's frames go nowhere.
    fn is_left_alone(&self, why: &str) {
        self.driver.wait("the message", || !lock(&self.told).is_empty());
        assert!(lock(&self.told)[0].contains(why), "{:?}", self.told);
        assert_eq!(self.driver.config::<2>(6), [0, 0], "the link is down");
        for _ in 0..20 {
            self.driver.submit(TRANSMIT, &[(DATA, 100, false)]);
            assert_eq!(self.driver.wait_for(TRANSMIT), 0);
        }
        self.driver.start(feature::ALL, 2);
        assert_eq!(lock(&self.told).len(), 1);
    }
}

#[test]
fn process_that_breaks_the_links_rules_takes_it_down_and_the_user_is_told_how() {
    // How much was sent, and a length.
    for (tail, len, why) in [
        (1_u32 << 31, 0_u32, "says that 0x80000000 bytes are in a ring"),
        (64, 0, "a packet that says it has 0 bytes"),
        (72_000, 70_000, "a packet that says it has 70000 bytes"),
    ] {
        let beside = Beside::new();
        beside.memory.store(4096, len);
        beside.memory.store(0, tail);
        beside.ring();
        beside.is_left_alone(why);
    }
}

#[test]
fn process_that_lies_about_room_is_found_out_by_a_frame_that_needs_some() {
    let beside = Beside::new();
    // More than was ever sent was taken out.
    beside.memory.store(256 + 64, 1_u32 << 31);
    for _ in 0..FITTING + 3 {
        beside.driver.submit(TRANSMIT, &[(DATA, MAX_MESSAGE as u32, false)]);
    }
    (0..FITTING + 3).for_each(|_| assert_eq!(beside.driver.wait_for(TRANSMIT), 0));
    beside.is_left_alone("bytes are left in a ring");
}
