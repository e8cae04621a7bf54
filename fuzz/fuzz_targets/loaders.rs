//! Kernel files are hostile: any bytes either load or are refused, in bounded time and memory, without a panic.
#![no_main]

use std::cell::OnceCell;

use libfuzzer_sys::fuzz_target;
use ringfence_boot::{BootSpec, Initrd, Kaslr, Protocol};
use ringfence_memory::GuestMemory;

const MEMORY: u64 = 64 << 20;

thread_local! {
    static GUEST: OnceCell<GuestMemory> = const { OnceCell::new() };
}

fuzz_target!(|data: &[u8]| {
    // The first byte chooses the options, the rest is the kernel.
    let Some((&options, kernel)) = data.split_first() else { return };
    let spec = BootSpec {
        protocol: [Protocol::Auto, Protocol::Linux64, Protocol::Pvh, Protocol::Multiboot]
            [usize::from(options & 3)],
        kaslr: if options & 4 != 0 { Kaslr::Seeded(1) } else { Kaslr::Off },
        decompress_in_guest: options & 8 != 0,
        initrds: &[Initrd { data: b"initrd", name: "fuzz" }],
        command_line: "console=ttyS0",
        ..BootSpec::new(kernel)
    };
    GUEST.with(|guest| {
        let memory = guest.get_or_init(|| GuestMemory::flat(MEMORY).expect("64 MiB of memory"));
        if let Ok(plan) = ringfence_boot::load(memory, &spec) {
            assert!(plan.kernel.end() <= MEMORY);
        }
    });
});
