//! What the tests of several devices share.

use std::sync::{Arc, Mutex};

use ringfence_disk::{BlockDevice, DiskInfo, IoError, Request};
use ringfence_engine::{BusDevice, ClockMode, InterruptSink, IrqLine, TimerQueue, VirtualClock, VirtualTime};

use crate::device::lock;
use crate::{PowerControl, PowerEvent};

/// A clock that only moves when told, with a record of every change of an interrupt line.
pub(crate) struct Bench {
    pub(crate) clock: Arc<VirtualClock>,
    pub(crate) timers: Arc<TimerQueue>,
    pub(crate) wires: Arc<Wires>,
}

/// Records what devices drive, and when.
pub(crate) struct Wires {
    clock: Arc<VirtualClock>,
    pub(crate) log: Mutex<Log>,
}

#[derive(Default)]
pub(crate) struct Log {
    pub(crate) levels: [bool; 24],
    /// Rising edges: when, on which line.
    pub(crate) edges: Vec<(u64, u32)>,
    /// Message-signalled interrupts: address and data.
    pub(crate) messages: Vec<(u64, u32)>,
}

impl InterruptSink for Wires {
    fn set_gsi(&self, gsi: u32, asserted: bool) {
        let mut log = lock(&self.log);
        if asserted && !log.levels[gsi as usize] {
            log.edges.push((self.clock.now().0, gsi));
        }
        log.levels[gsi as usize] = asserted;
    }

    fn send_msi(&self, address: u64, data: u32) {
        lock(&self.log).messages.push((address, data));
    }
}

impl Bench {
    pub(crate) fn new() -> Self {
        let clock = Arc::new(VirtualClock::new(ClockMode::Counted, 0));
        let wires = Arc::new(Wires { clock: Arc::clone(&clock), log: Mutex::default() });
        Self { clock, timers: Arc::default(), wires }
    }

    pub(crate) fn irq(&self, gsi: u32) -> IrqLine {
        IrqLine::new(Arc::clone(&self.wires) as _, gsi)
    }

    /// Moves time to `ns`, running timers at their exact deadlines.
    pub(crate) fn run_to(&self, ns: u64) {
        loop {
            let next = self.timers.next_deadline();
            if next > VirtualTime(ns) {
                break;
            }
            self.clock.advance_to(next);
            self.timers.run_due(self.clock.now());
        }
        self.clock.advance_to(VirtualTime(ns));
    }

    pub(crate) fn run_for(&self, ns: u64) {
        self.run_to(self.clock.now().0 + ns);
    }

    /// Moves time to `ns` and looks at the timers only then, as a host that was busy elsewhere does.
    pub(crate) fn oversleep_to(&self, ns: u64) {
        self.clock.advance_to(VirtualTime(ns));
        self.timers.run_due(self.clock.now());
    }

    /// Times of the rising edges of `gsi` since the last call.
    pub(crate) fn edges(&self, gsi: u32) -> Vec<u64> {
        let edges = std::mem::take(&mut lock(&self.wires.log).edges);
        edges.into_iter().filter(|(_, line)| *line == gsi).map(|(time, _)| time).collect()
    }

    /// Message-signalled interrupts since the last call.
    pub(crate) fn messages(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut lock(&self.wires.log).messages)
    }

    /// The level of `gsi`.
    pub(crate) fn level(&self, gsi: u32) -> bool {
        lock(&self.wires.log).levels[gsi as usize]
    }
}

/// Records what devices ask of the machine.
#[derive(Default)]
pub(crate) struct Requests(Mutex<Vec<PowerEvent>>);

impl PowerControl for Requests {
    fn request(&self, event: PowerEvent) {
        lock(&self.0).push(event);
    }
}

impl Requests {
    pub(crate) fn take(&self) -> Vec<PowerEvent> {
        std::mem::take(&mut lock(&self.0))
    }
}

pub(crate) fn read8(device: &dyn BusDevice, offset: u64) -> u8 {
    let mut data = [0xff];
    device.read(offset, &mut data);
    data[0]
}

pub(crate) fn read16(device: &dyn BusDevice, offset: u64) -> u16 {
    let mut data = [0xff; 2];
    device.read(offset, &mut data);
    u16::from_le_bytes(data)
}

pub(crate) fn read32(device: &dyn BusDevice, offset: u64) -> u32 {
    let mut data = [0xff; 4];
    device.read(offset, &mut data);
    u32::from_le_bytes(data)
}

pub(crate) fn write8(device: &dyn BusDevice, offset: u64, value: u8) {
    device.write(offset, &[value]);
}

/// A fixed sequence of numbers (xorshift64*).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }
}

/// Reads and writes registers of a device at random, in all sizes, while time passes. What is shown is that it
/// neither panics nor hangs, and that its state can be saved and loaded at any moment.
pub(crate) fn poke<D: BusDevice + crate::Device>(device: &D, span: u64, bench: &Bench, seed: u64) {
    let mut random = Random::new(seed);
    for step in 0..20_000 {
        let len = [1, 1, 1, 2, 4, 8][random.below(6) as usize];
        let offset = random.below(span);
        let mut data = random.next().to_le_bytes();
        if random.below(2) == 0 {
            device.read(offset, &mut data[..len]);
        } else {
            device.write(offset, &data[..len]);
        }
        match random.below(20) {
            0 => bench.run_for(random.below(3_000_000)),
            1 => bench.oversleep_to(bench.clock.now().0 + random.below(3_000_000_000)),
            2 => bench.run_for(random.below(3_000)),
            _ => (),
        }
        if step % 64 == 0 {
            let saved = device.save();
            device.restore(&saved).expect("a state just saved loads");
            assert_eq!(device.save(), saved);
        }
        if step % 4096 == 4095 {
            device.reset();
        }
        lock(&bench.wires.log).edges.clear();
    }
}

/// A disk that keeps its requests until told how they end.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) requests: Mutex<Vec<Request>>,
    info: DiskInfo,
}

impl Held {
    pub(crate) fn new(info: DiskInfo) -> Arc<Self> {
        Arc::new(Self { requests: Mutex::default(), info })
    }

    pub(crate) fn count(&self) -> usize {
        lock(&self.requests).len()
    }

    /// Ends the oldest request.
    pub(crate) fn end(&self, result: Result<(), IoError>) -> String {
        let request = lock(&self.requests).remove(0);
        let text = format!("{request:?}");
        (request.done)(result);
        text
    }
}

impl BlockDevice for Held {
    fn info(&self) -> DiskInfo {
        self.info
    }

    fn submit(&self, request: Request) {
        lock(&self.requests).push(request);
    }

    fn kick(&self) {}
}
