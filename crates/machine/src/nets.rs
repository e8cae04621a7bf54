//! The machine's network cards, each with a process of its own behind it.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::mpsc::Sender;

use ringfence_devices::virtio::net::{Net, NetConfig};
use ringfence_helper::Helper;
use ringfence_net::{Backend, MAX_QUEUES, NetError, NetSpec};

use crate::control::{Event, reporter};
use crate::error::MachineError;

/// Starts the processes and makes the cards.
pub(crate) fn open(
    specs: &[NetSpec],
    cpus: u32,
    events: &Sender<Event>,
    helpers: &mut Vec<Helper>,
) -> Result<Vec<Arc<Net>>, MachineError> {
    let mut cards = Vec::new();
    for (index, spec) in specs.iter().enumerate() {
        let helper = ringfence_net::start(spec)?;
        let config = NetConfig {
            mac: spec.mac.unwrap_or_else(|| mac(spec, index)),
            mtu: spec.mtu,
            pairs: spec.queues.unwrap_or_else(|| pairs(cpus)),
            link: helper.link.try_clone().map_err(NetError::Start)?,
            reporter: Arc::new(reporter(events, Event::DeviceBroken)),
        };
        cards.push(Arc::new(Net::new(config).map_err(NetError::Start)?));
        helpers.push(helper);
    }
    Ok(cards)
}

/// As many pairs of queues as vCPUs, which then never wait for each other.
fn pairs(cpus: u32) -> u16 {
    u16::try_from(cpus).unwrap_or(MAX_QUEUES).clamp(1, MAX_QUEUES)
}

/// An address for a card. Behind a NAT nobody else sees it, and it is the same each time; on a tap it must differ from other
/// machines'.
fn mac(spec: &NetSpec, index: usize) -> [u8; 6] {
    let number = match spec.backend {
        Backend::User(_) => 0x0012_3456 + index as u64,
        Backend::Tap(_) => RandomState::new().hash_one((std::process::id(), index)),
    };
    let [.., a, b, c] = number.to_be_bytes();
    // Locally administered (IEEE 802 8.2).
    [0x52, 0x54, 0x00, a, b, c]
}
