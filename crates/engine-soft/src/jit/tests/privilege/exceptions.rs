//! Exceptions that translated code delivers itself.

use ringfence_engine::Activity;
use ringfence_x86::SegmentRegister;

use super::*;
use crate::interp::event::TripleFault;

/// Instructions that raise an exception: #UD, #PF on a read and a write, #GP, #DE, and #PF on the stack.
const RAISING: [&[u8]; 6] = [
    &[0x0f, 0x0b],             // ud2
    &[0x48, 0x8b, 0x06],       // mov rax, [rsi]
    &[0x48, 0x89, 0x07],       // mov [rdi], rax
    &[0x41, 0x0f, 0x22, 0xc4], // mov cr0, r12
    &[0x48, 0xf7, 0xf1],       // div rcx
    &[0xff, 0x32],             // push [rdx]
];
/// Where they are, for the kernel and for programs.
const KERNEL_PROGRAM: u64 = at::KERNEL_ONLY + 0xc00;
const USER_PROGRAM: u64 = at::USER_CODE + 0xc00;
/// Vectors that come with an error code (SDM 3A 6.13).
const WITH_CODE: [u64; 2] = [13, 14];

/// Each instruction with `lea r14, [rip + what comes behind it]` before it; then again from the start.
fn program() -> Vec<u8> {
    let mut code = Vec::new();
    for raising in RAISING {
        code.extend([0x4c, 0x8d, 0x35, raising.len() as u8, 0, 0, 0]);
        code.extend(raising);
        code.extend([0x49, 0xff, 0xc7]); // inc r15
    }
    let back = -(code.len() as i32 + 5);
    code.push(0xe9);
    code.extend(back.to_le_bytes());
    code
}

fn both(vendor: Vendor) -> Both {
    let mut both = super::both(vendor);
    both.each(|cpu| {
        let put = |at: u64, code: &[u8]| cpu.memory.write_bytes(GuestAddress(at), code).unwrap();
        put(KERNEL_PROGRAM, &program());
        put(USER_PROGRAM, &program());
        for vector in 0..32 {
            // add rsp, 8; mov [rsp], r14; iretq
            let code = [0x48, 0x83, 0xc4, 0x08, 0x4c, 0x89, 0x34, 0x24, 0x48, 0xcf];
            put(at::HANDLERS + 16 * vector, &code[if WITH_CODE.contains(&vector) { 0 } else { 4 }..]);
        }
    });
    both.subject.m.cpu.translated.delivers = true;
    both
}

/// What became of a run of both.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    On,
    Shutdown(TripleFault),
}

impl Both {
    /// Runs up to so many instructions, and as many with as many exceptions by the interpreter.
    fn run_on(&mut self, limit: u64, exceptions: &mut [u64; 2]) -> Outcome {
        let subject = &mut self.subject.m;
        let before = (subject.cpu.retired, subject.cpu.translated.delivered);
        let mut outcome = Outcome::On;
        if let Err(exception) = run(subject, Some(&mut self.jit), limit) {
            exceptions[1] += 1;
            if let Err(fault) = subject.cpu.raise(exception) {
                outcome = Outcome::Shutdown(fault);
            }
        }
        if subject.cpu.activity == Activity::Shutdown {
            outcome = Outcome::Shutdown(subject.cpu.take_shutdown().expect("why it has shut down"));
        }
        let retired = subject.cpu.retired - before.0;
        assert!(retired <= limit, "{retired} of {limit}");
        exceptions[0] += subject.cpu.translated.delivered - before.1;
        let mut raised = subject.cpu.translated.delivered - before.1 + u64::from(exceptions[1] > 0);
        exceptions[1] = 0;
        let reference = &mut self.reference.m;
        let start = reference.cpu.retired;
        let mut expected = Outcome::On;
        loop {
            let done = reference.cpu.retired - start;
            if expected != Outcome::On || done >= retired && raised == 0 {
                break;
            }
            if let Err(exception) = run(reference, None, (retired - done).max(1)) {
                raised -= 1;
                if let Err(fault) = reference.cpu.raise(exception) {
                    expected = Outcome::Shutdown(fault);
                }
            }
        }
        assert_eq!(outcome, expected);
        let (a, b) = (&mut self.reference.m.cpu, &mut self.subject.m.cpu);
        // How a shutdown is told is the run loop's.
        (a.activity, b.activity) = (Activity::Active, Activity::Active);
        assert_eq!(a.save_state(), b.save_state());
        assert_eq!((a.cpl, a.class, a.flat, a.retired), (b.cpl, b.class, b.flat, b.retired));
        for cpu in [a, b] {
            // What delivery has not worked out anew has stayed right.
            let kept = |cpu: &Cpu| (cpu.flat, cpu.bases, cpu.class, cpu.code_size, cpu.stack_mask);
            let before = kept(cpu);
            cpu.update_mode();
            assert_eq!(before, kept(cpu));
        }
        outcome
    }

    fn prepare(&mut self, user: bool) {
        self.start(user, if user { USER_PROGRAM } else { KERNEL_PROGRAM });
        self.each(|cpu| {
            cpu.set_rflags(0x202);
            let [from, to] =
                if user { [at::KERNEL_ONLY, at::KERNEL_ONLY] } else { [at::ABSENT, at::ABSENT + 8] };
            (cpu.regs[6], cpu.regs[7], cpu.regs[2]) = (from, to, at::ABSENT);
            (cpu.regs[1], cpu.regs[12], cpu.regs[15]) = (0, 1 << 63, 0);
            for register in
                [SegmentRegister::Es, SegmentRegister::Ds, SegmentRegister::Fs, SegmentRegister::Gs]
            {
                cpu.segments[register as usize] = Default::default();
            }
            cpu.update_mode();
        });
    }
}

#[test]
fn exceptions_are_delivered_as_in_the_interpreter() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        for user in [false, true] {
            let mut both = both(vendor);
            both.prepare(user);
            let mut exceptions = [0, 0];
            let mut random = Random::new(seed(25) + u64::from(user));
            let start = both.subject.m.cpu.retired;
            for _ in 0..count(2000) {
                let limit = if random.chance(50) { 1 + random.below(40) } else { 3000 };
                assert_eq!(both.run_on(limit, &mut exceptions), Outcome::On);
            }
            let done = both.subject.m.cpu.retired - start;
            // An exception for every four or five instructions, its handler's included.
            assert!(
                exceptions[0] * 8 > done && both.subject.m.cpu.regs[15] * 10 > done,
                "{exceptions:?} of {done}"
            );
        }
    }
}

#[test]
fn exception_with_something_waiting_leaves_translated_code() {
    let mut both = both(Vendor::Intel);
    both.prepare(true);
    let mut exceptions = [0, 0];
    for _ in 0..20 {
        both.run_on(3000, &mut exceptions);
    }
    both.each(post);
    let before = both.subject.m.cpu.retired;
    exceptions[0] = 0;
    both.run_on(3000, &mut exceptions);
    assert_eq!(exceptions[0], 1);
    assert!(both.subject.m.cpu.retired - before < 10);
}

#[test]
fn exception_without_a_stack_shuts_down_as_in_the_interpreter() {
    let mut both = both(Vendor::Intel);
    both.prepare(false);
    let mut exceptions = [0, 0];
    for _ in 0..20 {
        assert_eq!(both.run_on(3000, &mut exceptions), Outcome::On);
    }
    both.each(|cpu| cpu.regs[4] = at::ABSENT + 0x800);
    exceptions[0] = 0;
    let outcome = (0..3).map(|_| both.run_on(3000, &mut exceptions)).find(|outcome| *outcome != Outcome::On);
    let Some(Outcome::Shutdown(fault)) = outcome else { panic!("{outcome:?}") };
    assert!(fault.chain.contains(", then ") && fault.chain.matches("then").count() == 2, "{fault}");
    assert_eq!(exceptions[0], 1, "translated code has delivered it");
}
