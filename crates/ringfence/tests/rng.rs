//! The entropy device, driven by a stock kernel: its modules are loaded in order by themselves, and what it gives is random.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::time::Duration;

use support::image::{BOOT, Session, ensure};
use support::ringfence;

/// Reads more than one request gives, twice.
const WORK: &str = r#"
echo "@current $(cat /sys/class/misc/hw_random/rng_current)"
dd if=/dev/hwrng of=/a bs=1000 count=20 iflag=fullblock 2>/dev/null
dd if=/dev/hwrng of=/b bs=1000 count=20 iflag=fullblock 2>/dev/null
echo "@sizes $(stat -c %s /a) $(stat -c %s /b)"
echo "@packed $(gzip -c /a | wc -c) $(cat /a /b | gzip -c | wc -c)"
# The driver lets go of the device and takes it again.
rmmod virtio_rng && modprobe virtio_rng
dd if=/dev/hwrng of=/c bs=1000 count=1 iflag=fullblock 2>/dev/null
echo "@again $(stat -c %s /c) $(cat /sys/class/misc/hw_random/rng_current)"
echo "@modules $(cut -d' ' -f1 /proc/modules | grep -c -E '^(virtio_pci|virtio_rng)$')"
grep virtio /proc/interrupts | sed 's/ \+/ /g; s/^/@interrupts /'
exit 23
"#;

#[test]
fn stock_kernel_gets_random_bytes_from_the_host() {
    ensure("shell");
    let mut command = ringfence();
    command.args(["run", "--timeout", "300", "--", "sh", "-c", WORK]);
    let session = Session::run(&mut command, BOOT + Duration::from_secs(60));
    let text = session.text();
    assert_eq!(session.status, Some(23), "{text}");
    let value = |name| session.value(name).0;
    assert_eq!(value("current"), "virtio_rng.0", "{text}");
    assert_eq!(value("sizes"), "20000 20000", "{text}");
    let packed: Vec<u32> = value("packed").split_whitespace().map(|n| n.parse().unwrap()).collect();
    // What is random does not get smaller, and the second time it is something else.
    assert!(packed[0] >= 20_000 && packed[1] >= 40_000, "{text}");
    assert_eq!(value("again"), "1000 virtio_rng.0", "{text}");
    assert_eq!(value("modules"), "2", "{text}");
    assert!(value("interrupts").contains("MSI"), "by MSI-X: {text}");
}
