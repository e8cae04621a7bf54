//! The throw-away process: executes the cases of a batch, one after the other.
//!
//! Every case begins and ends with a signal. The handler writes down the interrupted state, which the kernel laid on
//! the signal stack with all vector registers, then fills the same frame with the next case's state and returns:
//! `sigreturn` loads the general-purpose registers, flags, RIP, CS, SS and the XSAVE area at once. A case ends at an
//! exception, if no other then that of the INT3 bytes around its code. So there is no trampoline that could disturb
//! a register, and code of any mode can be entered.
//!
//! From the fork on, nothing here takes a lock or allocates: the parent may have had other threads. Once cases run,
//! FS is theirs, so nothing may use thread-local storage either, and only inline system calls are made.

use std::arch::{asm, naked_asm};
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::{c_int, c_void, siginfo_t, ucontext_t};

use crate::bases::{fs_base, gs_base, set_fs_base, set_gs_base, system_call};
use crate::case::{Case, INT3, Mode};
use crate::layout::{CODE, CODE_LEN, DATA, DATA_LEN, PAGE};
use crate::shared::{END_EXCEPTION, END_HUNG, END_NONE, END_SYSTEM_CALL, Record, Shared};
use crate::xsave::Areas;

/// How far the child came; anything but `Running` and `Done` at its end is a failure of that step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Step {
    Start,
    MapCode,
    MapData,
    Signals,
    Timers,
    Seccomp,
    Running,
    Done,
}

impl Step {
    pub(crate) fn name(value: u32) -> &'static str {
        const NAMES: [&str; 8] = [
            "starting",
            "mapping the code pages",
            "mapping the data pages",
            "installing signal handlers",
            "setting timers",
            "setting the system call filter",
            "running",
            "done",
        ];
        NAMES.get(value as usize).copied().unwrap_or("unknown")
    }
}

/// Time after which the kernel kills the whole child.
const DEADLINE_SECONDS: i64 = 30;
const SIGNAL_STACK: usize = 1 << 16;
/// Flags that a case may leave behind and that the handler must not run with: AC, NT, ID.
const UNSAFE_FLAGS: i32 = 1 << 18 | 1 << 14 | 1 << 21;
/// Flags that a case sets: CF, PF, AF, ZF, SF, TF, DF, OF, AC.
const CASE_FLAGS: u64 = 0x8d5 | 1 << 8 | 1 << 10 | 1 << 18;

/// What the handler works with; in the child's own memory.
struct Context {
    shared: *mut Shared,
    index: usize,
    started: bool,
    code: *mut [u8; CODE_LEN],
    data: *mut [u8; DATA_LEN],
    before: [u8; DATA_LEN],
    areas: Areas,
    fsgsbase: bool,
    host_fs: u64,
    last_tick: usize,
}

/// The one context of this process. Set after the fork, so that each child has its own.
static CONTEXT: AtomicPtr<Context> = AtomicPtr::new(std::ptr::null_mut());

/// Executes the cases from `shared.current` to `shared.count` and exits.
///
/// # Safety
/// Only in a process just forked, with `shared` its shared mapping, and on its only thread.
pub(crate) unsafe fn run(shared: *mut Shared, areas: Areas, fsgsbase: bool) -> ! {
    let mut context = Context {
        shared,
        index: 0,
        started: false,
        code: std::ptr::null_mut(),
        data: std::ptr::null_mut(),
        before: [0; DATA_LEN],
        areas,
        fsgsbase,
        host_fs: 0,
        last_tick: usize::MAX,
    };
    // SAFETY: the contract of this function; `context` lives until the process ends.
    unsafe {
        context.index = (*shared).current.load(Ordering::Relaxed) as usize;
        let mut stack = [0u8; SIGNAL_STACK];
        if prepare(&mut context, &mut stack).is_err() {
            let errno = *libc::__errno_location();
            (*shared).errno.store(errno as u32, Ordering::Relaxed);
            libc::_exit(1);
        }
        (*shared).step.store(Step::Running as u32, Ordering::Relaxed);
        CONTEXT.store(&raw mut context, Ordering::Relaxed);
        // The first signal; the handler goes on from there and never comes back here.
        asm!("int3");
        libc::_exit(2);
    }
}

fn check(result: c_int) -> Result<(), ()> {
    if result < 0 { Err(()) } else { Ok(()) }
}

unsafe fn prepare(context: &mut Context, stack: &mut [u8; SIGNAL_STACK]) -> Result<(), ()> {
    // SAFETY: the process was just forked, so its address space, signals, timers and filters are its own to change;
    // the fixed addresses are refused (MAP_FIXED_NOREPLACE) if something is there.
    unsafe {
        let step = |step: Step| (*context.shared).step.store(step as u32, Ordering::Relaxed);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);

        step(Step::MapCode);
        let pages = libc::memfd_create(c"case".as_ptr(), libc::MFD_CLOEXEC);
        check(pages)?;
        check(libc::ftruncate(pages, (CODE_LEN + DATA_LEN) as i64))?;
        let all = map(0, CODE_LEN + DATA_LEN, libc::PROT_READ | libc::PROT_WRITE, pages, 0)?;
        context.code = all.cast();
        context.data = all.add(CODE_LEN).cast();
        (*context.code).fill(INT3);
        // Reading now makes the page present, so that a forbidden access says "protection".
        let touch = |page: *const u8| _ = page.read_volatile();
        let code = map(CODE, CODE_LEN, libc::PROT_READ | libc::PROT_EXEC, pages, 0)?;
        touch(code);
        touch(code.add(PAGE as usize));

        step(Step::MapData);
        for (i, page) in DATA.iter().enumerate() {
            let protection = libc::PROT_READ | if page.writable { libc::PROT_WRITE } else { 0 };
            let offset = CODE_LEN as i64 + i as i64 * PAGE as i64;
            touch(map(page.address, PAGE as usize, protection, pages, offset)?);
        }

        step(Step::Signals);
        let alternate =
            libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: SIGNAL_STACK };
        check(libc::sigaltstack(&raw const alternate, std::ptr::null_mut()))?;
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = entry as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&raw mut action.sa_mask);
        for signal in [
            libc::SIGSEGV,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGBUS,
            libc::SIGTRAP,
            libc::SIGSYS,
            libc::SIGVTALRM,
        ] {
            check(libc::sigaction(signal, &raw const action, std::ptr::null_mut()))?;
        }
        let mut default: libc::sigaction = std::mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        check(libc::sigaction(libc::SIGALRM, &raw const default, std::ptr::null_mut()))?;
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()))?;

        step(Step::Timers);
        let every = |seconds, microseconds, repeat| {
            let value = libc::timeval { tv_sec: seconds, tv_usec: microseconds };
            let never = libc::timeval { tv_sec: 0, tv_usec: 0 };
            libc::itimerval { it_value: value, it_interval: if repeat { value } else { never } }
        };
        let tick = every(0, (*context.shared).tick.load(Ordering::Relaxed).into(), true);
        check(libc::setitimer(libc::ITIMER_VIRTUAL, &raw const tick, std::ptr::null_mut()))?;
        let deadline = every(DEADLINE_SECONDS, 0, false);
        check(libc::setitimer(libc::ITIMER_REAL, &raw const deadline, std::ptr::null_mut()))?;

        context.host_fs = fs_base(context.fsgsbase);
        step(Step::Seccomp);
        filter_system_calls()
    }
}

unsafe fn map(address: u64, len: usize, protection: c_int, file: c_int, offset: i64) -> Result<*mut u8, ()> {
    let fixed = if address == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
    // SAFETY: a new mapping that replaces none.
    let at = unsafe {
        let at = address as *mut c_void;
        libc::mmap(at, len, protection, libc::MAP_SHARED | libc::MAP_POPULATE | fixed, file, offset)
    };
    if at == libc::MAP_FAILED { Err(()) } else { Ok(at.cast()) }
}

/// Lets through what the handler needs; anything else, such as a SYSCALL in the code under test, raises SIGSYS.
unsafe fn filter_system_calls() -> Result<(), ()> {
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    const LOAD: u16 = 0x20;
    const JUMP_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let call = |number: i64, left: u8| op(JUMP_EQUAL, left, 0, number as u32);
    let program = [
        op(LOAD, 0, 0, 4),
        op(JUMP_EQUAL, 0, 4, AUDIT_ARCH_X86_64),
        op(LOAD, 0, 0, 0),
        call(libc::SYS_rt_sigreturn, 3),
        call(libc::SYS_exit_group, 2),
        call(libc::SYS_arch_prctl, 1),
        op(RETURN, 0, 0, libc::SECCOMP_RET_TRAP),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: restricts this process only; the program is valid for the duration of the call.
    unsafe {
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        check(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter))
    }
}

/// Where the kernel enters. AC survives the delivery of a signal and would make misaligned accesses of compiled code
/// fault.
#[unsafe(naked)]
unsafe extern "C" fn entry() {
    naked_asm!(
        "pushfq",
        "and dword ptr [rsp], {flags}",
        "popfq",
        "cld",
        "jmp {handler}",
        flags = const !UNSAFE_FLAGS,
        handler = sym handler,
    )
}

unsafe extern "C" fn handler(signal: c_int, _info: *mut siginfo_t, frame: *mut ucontext_t) {
    // SAFETY: `CONTEXT` was set before the first signal; signals are blocked here, so this is the only use of it.
    // `frame` is the kernel's. The indices stay below `count`, which the parent keeps within the arrays.
    unsafe {
        let context = &mut *CONTEXT.load(Ordering::Relaxed);
        if signal == libc::SIGVTALRM
            && std::mem::replace(&mut context.last_tick, context.index) != context.index
        {
            return;
        }
        let fs = fs_base(context.fsgsbase);
        set_fs_base(context.fsgsbase, context.host_fs);
        if context.started {
            let record = &raw mut (*context.shared).records[context.index];
            record_state(context, signal, &*frame, fs, &mut *record);
            context.index += 1;
        }
        context.started = true;
        (*context.shared).current.store(context.index as u32, Ordering::Relaxed);
        if context.index >= (*context.shared).count.load(Ordering::Relaxed) as usize {
            (*context.shared).step.store(Step::Done as u32, Ordering::Relaxed);
            system_call(libc::SYS_exit_group, 0, 0);
        }
        let case = &raw const (*context.shared).cases[context.index];
        load_state(context, &*case, &mut *frame);
    }
}

/// Positions in `gregs` of the registers in encoding order.
const GREGS: [c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// # Safety
/// `frame` is the signal frame being handled.
unsafe fn record_state(
    context: &mut Context,
    signal: c_int,
    frame: &ucontext_t,
    fs: u64,
    record: &mut Record,
) {
    let machine = &frame.uc_mcontext;
    let register = |number: c_int| machine.gregs[number as usize] as u64;
    record.end = match signal {
        libc::SIGVTALRM => END_HUNG,
        libc::SIGSYS => END_SYSTEM_CALL,
        _ => END_EXCEPTION,
    };
    record.vector = register(libc::REG_TRAPNO) as u32;
    record.error = register(libc::REG_ERR);
    record.address = register(libc::REG_CR2);
    for (value, &number) in record.gpr.iter_mut().zip(&GREGS) {
        *value = register(number);
    }
    record.rip = register(libc::REG_RIP);
    record.rflags = register(libc::REG_EFL);
    record.fs_base = fs;
    // SAFETY: reading segment registers and the GS base has no effect; the area belongs to the frame.
    unsafe {
        record.gs_base = gs_base(context.fsgsbase);
        // The frame packs CS, GS, FS and SS; the kernel leaves the data segments in the registers.
        let packed = register(libc::REG_CSGSFS);
        let (es, ds, fs, gs): (u16, u16, u16, u16);
        asm!("mov {0:x}, es", "mov {1:x}, ds", out(reg) es, out(reg) ds, options(nomem, nostack, preserves_flags));
        asm!("mov {0:x}, fs", "mov {1:x}, gs", out(reg) fs, out(reg) gs, options(nomem, nostack, preserves_flags));
        record.segments = [es, packed as u16, (packed >> 48) as u16, ds, fs, gs];
        context.areas.store(machine.fpregs.cast(), &mut record.vectors);
    }
    // SAFETY: the child's own mapping of the data pages.
    let after = unsafe { &*context.data };
    let before = &context.before;
    let differ = |&i: &usize| after[8 * i..8 * i + 8] != before[8 * i..8 * i + 8];
    (record.change_start, record.change_len) = (0, 0);
    if after != before {
        let first = (0..DATA_LEN / 8).find(differ).unwrap_or(0) * 8;
        let last = (0..DATA_LEN / 8).rfind(differ).unwrap_or(0) * 8 + 8;
        record.change[first..last].copy_from_slice(&after[first..last]);
        (record.change_start, record.change_len) = (first as u32, (last - first) as u32);
    }
    let start = usize::from(case_offset(context));
    // SAFETY: the child's own mapping of the code pages.
    let code = unsafe { &mut *context.code };
    let end = (start + crate::case::CODE_MAX).min(CODE_LEN);
    code[start.min(end)..end].fill(INT3);
}

fn case_offset(context: &Context) -> u16 {
    // SAFETY: the index is below the count, which is within the array.
    unsafe { (&(*context.shared).cases)[context.index].code_offset }
}

/// # Safety
/// `frame` is the signal frame being handled.
unsafe fn load_state(context: &mut Context, case: &Case, frame: &mut ucontext_t) {
    /// `uc_flags`: SS is in the frame, and is to be loaded as it stands.
    const LOAD_SS: u64 = 2 | 4;
    // SAFETY: the child's own mappings and the shared record, which nobody else uses while the child runs.
    unsafe {
        (&mut (*context.shared).records)[context.index].end = END_NONE;
        case.place_code(&mut *context.code);
        case.fill_data(&mut context.before);
        (*context.data).copy_from_slice(&context.before);
    }
    let machine = &mut frame.uc_mcontext;
    for (&value, &number) in case.gpr.iter().zip(&GREGS) {
        machine.gregs[number as usize] = value as i64;
    }
    machine.gregs[libc::REG_RIP as usize] = case.rip() as i64;
    machine.gregs[libc::REG_EFL as usize] = (case.rflags & CASE_FLAGS | 0x202) as i64;
    let [es, cs, ss, ds, fs, gs] = case.segments;
    machine.gregs[libc::REG_CSGSFS as usize] = (u64::from(cs) | u64::from(ss) << 48) as i64;
    frame.uc_flags |= LOAD_SS;
    // SAFETY: the area belongs to the frame. The generator uses only selectors that can be loaded, else the child
    // dies here, which the parent copes with; compiled code addresses through no segment but SS and DS, whose bases
    // 64-bit mode ignores, and uses no thread-local storage (FS).
    unsafe {
        context.areas.load(machine.fpregs.cast(), &case.vectors);
        asm!("mov es, {0:x}", "mov ds, {1:x}", in(reg) es, in(reg) ds, options(nostack, preserves_flags));
        asm!("mov fs, {0:x}", "mov gs, {1:x}", in(reg) fs, in(reg) gs, options(nostack, preserves_flags));
        if case.mode() == Mode::Bits64 || fs <= 3 {
            set_fs_base(context.fsgsbase, case.fs_base);
        }
        if case.mode() == Mode::Bits64 || gs <= 3 {
            set_gs_base(context.fsgsbase, case.gs_base);
        }
    }
}
