//! Linux: bzImage and vmlinux by the 64-bit boot protocol (Linux, Documentation/arch/x86/boot.rst).

mod bzimage;
mod header;
mod initrd;
mod relocate;
mod vmlinux;
mod zero_page;

pub(crate) use bzimage::{is_bzimage, load as load_bzimage};
pub(crate) use initrd::{needed as needed_for_initrd, place as place_initrd, write as write_initrd};
pub(crate) use vmlinux::{claim_segments, load as load_vmlinux};
