//! Arbitrary bytes as 64-bit guest code do the same translated as interpreted, and never panic, hang or touch anything but
//! the guest.
//!
//! Input: see `ringfence_fuzz::guest`; the mode is always 64-bit.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ringfence_engine_soft::interp::op::RIP;
use ringfence_engine_soft::interp::run::Interpreter;
use ringfence_engine_soft::jit::{Jit, Options};
use ringfence_fuzz::{CODE, HEADER, TABLES, guest};
use ringfence_memory::GuestAddress;

/// Most instructions in a case.
const MOST: u64 = 2000;

/// The guest's page tables, without what walks mark in them.
fn tables(guest: &Interpreter) -> Vec<u64> {
    const MARKS: u64 = 0x60;
    let entry = |at| guest.cpu.memory.read::<u64>(GuestAddress(at)).expect("the tables are there") & !MARKS;
    (TABLES..TABLES + 0x3000).step_by(8).map(entry).collect()
}

fuzz_target!(|data: &[u8]| {
    let Some((header, code)) = data.split_at_checked(HEADER) else { return };
    let mut header = header.to_vec();
    // 64-bit, at CPL 0 or 3.
    header[0] = header[0] & 0x80 | if header[0] & 1 != 0 { 3 } else { 0 };
    let (Some(mut reference), Some(mut subject)) = (guest(&header, code), guest(&header, code)) else {
        return;
    };
    let options = Options { code_size: 1 << 20, threshold: 1, exact_flags: true, ..Options::default() };
    let mut jit = Jit::new(options, &subject.cpu.code).expect("the host can run translated code");
    let (mut retired, mut faults) = (0, 0);
    let tables = tables(&subject);
    while retired < MOST && faults < 32 {
        let before = subject.cpu.retired;
        let outcome = jit.run(&mut subject, 200);
        if self::tables(&subject) != tables {
            // The two soft TLBs need not have forgotten the same of what the page tables were.
            return;
        }
        // The x87 state is the thread's, and two vCPUs share this one.
        subject.cpu.vector.unit.park();
        let count = subject.cpu.retired - before;
        retired += count;
        let start = reference.cpu.retired;
        let mut expected = Ok(());
        while expected.is_ok() {
            let left = count - (reference.cpu.retired - start);
            if left == 0 && outcome.is_ok() {
                break;
            }
            expected = reference.run_block((left as usize).max(1));
        }
        reference.cpu.vector.unit.park();
        assert_eq!(outcome, expected, "the outcome at {:#x}", reference.cpu.rip());
        let (a, b) = (&reference.cpu, &subject.cpu);
        assert_eq!((a.regs, a.retired, a.rflags()), (b.regs, b.retired, b.rflags()), "registers");
        if outcome.is_err() || count == 0 {
            faults += 1;
            for machine in [&mut reference, &mut subject] {
                machine.cpu.regs[RIP] = machine.cpu.regs[RIP].wrapping_add(1);
                machine.cpu.leave_block = false;
            }
        }
        if reference.cpu.activity != ringfence_engine::Activity::Active || !reference.cpu.is_64bit() {
            break;
        }
    }
    let memories = [&reference, &subject].map(|machine| {
        let mut bytes = vec![0; 0x2_0000];
        machine.cpu.memory.read_bytes(GuestAddress(CODE), &mut bytes).expect("the memory is there");
        bytes
    });
    assert!(memories[0] == memories[1], "memory");
});
