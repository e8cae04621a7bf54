//! Floating-point exceptions of the host's in generated code.
//!
//! Where a guest does not mask a floating-point exception, its instructions run with the host's masks as the guest's are. Then the host's processor
//! raises the exception just where the guest's would, with nothing changed but the flags that the guest is to find changed, and the
//! host's kernel makes a signal (SIGFPE) of it. Whoever runs generated code says beforehand where a thread then goes on: a
//! [`Landing`] in generated code. The signal's handler does no more than to put that in place; all that is to be worked out is
//! worked out there, by ordinary code.
//!
//! The kernel writes the signal's frame to the stack that the thread is on, below what generated code keeps there.

use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use libc::{c_int, c_void, siginfo_t, ucontext_t};

/// Where a thread goes on when the host raises a floating-point exception in generated code.
#[derive(Clone, Debug)]
pub(crate) struct Landing {
    /// Addresses of the code that this is about.
    pub(crate) code: Range<u64>,
    /// Address of the code that goes on. It finds all registers as they were, the host's flags included.
    pub(crate) to: u64,
    /// Where the address of the instruction is to be written, and the host's RFLAGS; null for nowhere.
    pub(crate) note: *mut Raised,
}

/// Where an exception was raised.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Raised {
    /// The host's address of the instruction.
    pub(crate) at: u64,
    /// The host's RFLAGS.
    pub(crate) flags: u64,
}

impl Landing {
    const NONE: Self = Self { code: 0..0, to: 0, note: std::ptr::null_mut() };
}

thread_local! {
    /// Constant at first and without a destructor: the signal's handler may look at it wherever it comes.
    static LANDING: Cell<Landing> = const { Cell::new(Landing::NONE) };
}

/// Calls `run`, which runs generated code, with this landing.
#[inline(always)]
pub(crate) fn with<R>(landing: Landing, run: impl FnOnce() -> R) -> R {
    let outer = LANDING.replace(landing);
    let result = run();
    LANDING.set(outer);
    result
}

/// The first of the kernel's reasons for the signal that is not an integer's: division by zero; and what is beyond all of them.
const FPE_FLTDIV: c_int = 3;
const SI_KERNEL: c_int = 0x80;

/// What the process did about the signal before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Has the process heed [`Landing`]s.
///
/// # Errors
/// If the host does not let it handle signals.
pub(crate) fn heed() -> io::Result<()> {
    static DONE: OnceLock<Result<(), c_int>> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        // SAFETY: all zeroes are a valid sigaction.
        let [mut action, mut before]: [libc::sigaction; 2] = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        // SAFETY: the handler does nothing that may not be done wherever a signal comes.
        if unsafe { libc::sigaction(libc::SIGFPE, &raw const action, &raw mut before) } != 0 {
            return Err(io::Error::last_os_error().raw_os_error().unwrap_or(0));
        }
        let _ = BEFORE.set(before);
        Ok(())
    });
    done.map_err(io::Error::from_raw_os_error)
}

extern "C" fn on_signal(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands a handler that asked for them both of these.
    let (code, registers) =
        unsafe { ((*info).si_code, &mut (*context.cast::<ucontext_t>()).uc_mcontext.gregs) };
    let at = registers[libc::REG_RIP as usize] as u64;
    // Nothing writes to it while the signal is handled.
    let landing = LANDING.replace(Landing::NONE);
    let (to, note) = (landing.to, landing.note);
    // Not sent by somebody, and neither by an integer division.
    let floating = (FPE_FLTDIV..SI_KERNEL).contains(&code);
    let lands = floating && landing.code.contains(&at);
    LANDING.set(landing);
    if !lands {
        return pass_on(signal, info, context);
    }
    if !note.is_null() {
        let flags = registers[libc::REG_EFL as usize] as u64;
        // SAFETY: whoever made the landing owns it, and runs the code that the signal has interrupted.
        unsafe { note.write(Raised { at, flags }) };
    }
    registers[libc::REG_RIP as usize] = to as i64;
}

/// Does with the signal what the process did before.
#[cold]
fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let before = BEFORE.get().map_or((libc::SIG_DFL, 0), |before| (before.sa_sigaction, before.sa_flags));
    match before {
        (libc::SIG_DFL | libc::SIG_IGN, _) => {
            // SAFETY: all zeroes are the default action; the kernel handed over the other.
            unsafe {
                let sent = (*info).si_code <= 0;
                if sent && before.0 == libc::SIG_IGN {
                    return;
                }
                let action: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, &raw const action, std::ptr::null_mut());
                if sent {
                    libc::raise(signal);
                }
                // Otherwise the instruction raises it again.
            }
        }
        (handler, flags) if flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: a handler of this kind, called as the kernel calls it.
            let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        (handler, _) => {
            // SAFETY: as above.
            let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}
