//! A guest may do anything to a virtio device, DMA included: see [`ringfence_devices::virtio::fuzz`].
#![no_main]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

/// An unlinked file that keeps what the guests before have written.
fn image() -> &'static File {
    static IMAGE: OnceLock<File> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let file = tempfile::tempfile().expect("a temporary file can be made");
        file.set_len(128 << 10).expect("it can have 128 KiB");
        file
    })
}

fuzz_target!(|input: &[u8]| {
    let path = format!("/proc/self/fd/{}", image().as_raw_fd());
    ringfence_devices::virtio::fuzz::run_any(path.as_ref(), input);
});
