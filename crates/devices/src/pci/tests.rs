mod endpoint;

use super::*;
use crate::Device;
use crate::testing::{Bench, Requests, poke, read8, read16, read32, write8};

fn host() -> (Arc<Requests>, Arc<PciBus>, Arc<PciHost>) {
    let requests = Arc::new(Requests::default());
    let bus = PciBus::new();
    let host = PciHost::new(Arc::clone(&bus), Arc::clone(&requests) as _);
    (requests, bus, host)
}

fn select(host: &PciHost, bus: u8, device: u8, function: u8, register: u8) {
    let address = PciAddress::new(bus, device, function).bits();
    let value = CONFIG_ENABLE | u32::from(address) << 8 | u32::from(register);
    host.write(0, &value.to_le_bytes());
}

#[test]
fn scan_finds_the_host_bridge_and_nothing_else() {
    let (_, _, host) = host();
    let mut found = Vec::new();
    for bus in 0..=255 {
        for device in 0..32 {
            select(&host, bus, device, 0, 0);
            let id = read32(&*host, 4);
            if id != u32::MAX {
                found.push((bus, device, id));
            }
        }
    }
    assert_eq!(found, [(0, 0, 0x0008_1b36)]);
    select(&host, 0, 0, 0, 8);
    assert_eq!(read16(&*host, 6), 0x0600, "class code of a host bridge");
    assert_eq!(read8(&*host, 7), 6);
    select(&host, 0, 0, 0, 0x0c);
    assert_eq!(read32(&*host, 4), 0, "header type 0, one function");
}

#[test]
fn data_port_is_silent_unless_enabled() {
    let (_, _, host) = host();
    host.write(0, &0_u32.to_le_bytes());
    assert_eq!(read32(&*host, 4), u32::MAX);
    host.write(0, &0xffff_ffff_u32.to_le_bytes());
    assert_eq!(read32(&*host, 0), 0x80ff_fffc);
    write8(&*host, 0, 0x12);
    assert_eq!(read32(&*host, 0), 0x80ff_fffc, "only a 4-byte write reaches the address register");
    assert_eq!(read16(&*host, 0), 0xffff);
}

#[derive(Default)]
struct Scratch(Mutex<[u8; 8]>);

impl PciFunction for Scratch {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let at = usize::from(offset & 7);
        data.copy_from_slice(&lock(&self.0)[at..at + data.len()]);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let at = usize::from(offset & 7);
        lock(&self.0)[at..at + data.len()].copy_from_slice(data);
    }
}

#[test]
fn plugged_function_gets_byte_and_word_accesses_at_their_offsets() {
    let (_, bus, host) = host();
    let place = PciAddress::new(0, 3, 1);
    bus.plug(place, Arc::new(Scratch::default())).unwrap();
    assert!(matches!(bus.plug(place, Arc::new(HostBridge)), Err(PciError::Taken(p)) if p == place));
    select(&host, 0, 3, 1, 4);
    host.write(4, &0x1122_3344_u32.to_le_bytes());
    host.write(6, &0xaabb_u16.to_le_bytes());
    write8(&*host, 4, 0xcc);
    assert_eq!(read32(&*host, 4), 0xaabb_33cc);
    let mut data = [0; 4];
    host.read(6, &mut data);
    assert_eq!(data, [0; 4], "an access past the data port is not taken");
}

#[test]
fn reset_register_resets_on_a_rise_of_its_bit() {
    let (requests, _, host) = host();
    write8(&*host, RESET_CONTROL, SYSTEM_RESET);
    assert_eq!(requests.take(), []);
    write8(&*host, RESET_CONTROL, crate::platform::RESET_VALUE);
    assert_eq!(requests.take(), [PowerEvent::Reset]);
    write8(&*host, RESET_CONTROL, crate::platform::RESET_VALUE);
    assert_eq!(requests.take(), [], "the bit did not rise");
    select(&host, 0, 6, 0, 0);
    assert_eq!(requests.take(), [], "an address whose second byte has the bit is no reset");
    host.reset();
    assert_eq!(read8(&*host, RESET_CONTROL), 0);
}

#[test]
fn random_accesses_leave_a_working_bridge() {
    let (_, bus, host) = host();
    bus.plug(PciAddress::new(0, 1, 0), Arc::new(Scratch::default())).unwrap();
    poke(&*host, 8, &Bench::new(), 7);
    select(&host, 0, 0, 0, 0);
    assert_eq!(read32(&*host, 4), 0x0008_1b36);
}
