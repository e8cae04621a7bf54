//! The machine's vsock, with a process of its own behind it.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use ringfence_devices::virtio::vsock::{Vsock, VsockConfig};
use ringfence_helper::Helper;
use ringfence_vsock::{VsockError, VsockSpec};

use crate::control::{Event, reporter};
use crate::error::MachineError;

/// Starts the process and makes the device.
pub(crate) fn open(
    spec: &VsockSpec,
    events: &Sender<Event>,
    helpers: &mut Vec<Helper>,
) -> Result<Arc<Vsock>, MachineError> {
    let helper = ringfence_vsock::start(spec)?;
    let config = VsockConfig {
        cid: spec.cid,
        link: helper.link.try_clone().map_err(VsockError::Start)?,
        reporter: Arc::new(reporter(events, Event::DeviceBroken)),
    };
    let device = Vsock::new(config).map_err(VsockError::Start)?;
    helpers.push(helper);
    Ok(Arc::new(device))
}
