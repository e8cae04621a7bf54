//! A driver for the tests of devices: follows the rules, and sees the interrupts.

use std::io::{self, IoSlice};
use std::ops::Deref;
use std::sync::{Arc, Mutex};

use ringfence_engine::InterruptSink;
use ringfence_helper::Link;

use super::guest::Guest;
pub(super) use super::guest::{DATA, RAM};
use super::spec::{common, feature};
use super::{Reporter, SharedDevice};
use crate::device::lock;
use crate::pci::PciFunction;
use crate::testing::Bench;

/// More than any message has bytes.
const LONGEST: usize = 1 << 18;

/// What a driver agrees to of the core's features unless it says otherwise.
const CORE: u64 = feature::VERSION_1 | feature::INDIRECT;

/// A driver, and the other end of its device's link, which tests play themselves.
pub(super) struct Linked {
    pub(super) driver: Driver,
    pub(super) other: Link,
    /// What the device tells the user.
    pub(super) told: Arc<Mutex<Vec<String>>>,
}

impl Linked {
    /// A device from `make` on the first of `ends` that is running with `features` and `queues`.
    pub(super) fn running(
        ends: io::Result<(Link, Link)>,
        features: u64,
        queues: u16,
        make: impl FnOnce(Link, Reporter) -> SharedDevice,
    ) -> Self {
        let (link, other) = ends.unwrap();
        let told: Arc<Mutex<Vec<String>>> = Arc::default();
        let teller = Arc::clone(&told);
        let device = make(link, Arc::new(move |text| lock(&teller).push(text)));
        Self { driver: Driver::running(device, features, queues), other, told }
    }

    /// The next message that the process gets.
    pub(super) fn received(&self) -> Vec<u8> {
        let mut buffer = vec![0; LONGEST];
        let len = self.other.receive(&mut buffer, true).unwrap().unwrap();
        buffer.truncate(len);
        buffer
    }

    pub(super) fn send(&self, message: &[u8]) {
        self.other.send(&[IoSlice::new(message)]).unwrap();
    }
}

pub(super) struct Driver {
    pub(super) bench: Bench,
    guest: Guest,
}

impl Deref for Driver {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.guest
    }
}

impl Driver {
    /// A device that is plugged in, bus master, and not initialised.
    pub(super) fn new(device: SharedDevice) -> Self {
        let bench = Bench::new();
        let interrupts = Arc::clone(&bench.wires) as Arc<dyn InterruptSink>;
        Self { guest: Guest::new(device, &interrupts), bench }
    }

    /// The same with `features` of the device's own agreed on and `queues` queues running.
    pub(super) fn running(device: SharedDevice, features: u64, queues: u16) -> Self {
        let driver = Self::new(device);
        driver.start(features, queues);
        driver
    }

    /// From anywhere to running.
    pub(super) fn start(&self, features: u64, queues: u16) {
        self.guest.start(features | CORE, queues);
    }

    pub(super) fn set(&self, register: u64, len: usize, value: u64) {
        self.write(register, len, value);
    }

    /// Part of the device's configuration.
    pub(super) fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.function.read_registers(super::guest::CONFIG + offset, &mut data);
        data
    }

    pub(super) fn set_config(&self, offset: u64, data: &[u8]) {
        self.function.write_registers(super::guest::CONFIG + offset, data);
    }

    /// Switches MSI-X on, with vector `v` leading to data `v`: 0 for the configuration, and one for each queue after it.
    pub(super) fn use_messages(&self) {
        use ringfence_engine::Bus;
        let mut base = [0; 4];
        self.function.config_read(0x20, &mut base);
        let base = u64::from(u32::from_le_bytes(base) & !0xf);
        for vector in 0..=u32::from(self.queues()) {
            for (offset, word) in [(0, 0xfee0_0000), (4, 0), (8, vector), (12, 0)] {
                let at = ringfence_memory::GuestAddress(base + u64::from(vector) * 16 + offset);
                self.bus.memory_write(at, &u32::to_le_bytes(word));
            }
        }
        self.function.config_write(0x48 + 2, &0x8000_u16.to_le_bytes());
        self.write(common::CONFIG_VECTOR, 2, 0);
        for queue in 0..u64::from(self.queues()) {
            self.write(common::QUEUE_SELECT, 2, queue);
            self.write(common::QUEUE_VECTOR, 2, queue + 1);
            assert_eq!(self.read(common::QUEUE_VECTOR, 2), queue + 1);
        }
    }
}
