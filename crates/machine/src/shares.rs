//! The machine's shared folders, each with a process of its own behind it.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use ringfence_devices::virtio::share::{Share, ShareConfig};
use ringfence_helper::Helper;
use ringfence_share::{ShareError, ShareSpec};

use crate::control::{Event, reporter};
use crate::error::MachineError;

/// Starts the processes and makes the devices.
pub(crate) fn open(
    specs: &[ShareSpec],
    events: &Sender<Event>,
    helpers: &mut Vec<Helper>,
) -> Result<Vec<Arc<Share>>, MachineError> {
    let mut shares = Vec::new();
    for spec in specs {
        let helper = ringfence_share::start(spec)?;
        let config = ShareConfig {
            tag: spec.tag.clone(),
            link: helper.link.try_clone().map_err(ShareError::Start)?,
            reporter: Arc::new(reporter(events, Event::DeviceBroken)),
        };
        shares.push(Arc::new(Share::new(config).map_err(ShareError::Start)?));
        helpers.push(helper);
    }
    Ok(shares)
}
