//! The parent's side: hands out batches of cases to children and collects the outcomes.

use std::sync::atomic::Ordering;

use ringfence_x86::Segment;
use ringfence_x86::segment::attribute;

use crate::case::{Case, Mode};
use crate::child::{self, Step};
use crate::layout::{DATA_LEN, LDT};
use crate::outcome::{Change, End, Outcome};
use crate::shared::{BATCH, END_EXCEPTION, END_HUNG, END_NONE, END_SYSTEM_CALL, Mapping, Record};
use crate::xsave::Areas;

/// Why no outcome could be had.
#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    /// Shared memory.
    #[error("cannot map the memory shared with the child process ({0}); is there too little of it?")]
    Memory(std::io::Error),
    /// A process.
    #[error("cannot fork a child process ({0}); raise the limit on processes")]
    Fork(std::io::Error),
    /// The child could not set itself up.
    #[error(
        "the child process failed at {step} ({error}); the host must allow memfd, seccomp and fixed mappings"
    )]
    Child {
        /// What it was doing.
        step: &'static str,
        /// What the system said.
        error: std::io::Error,
    },
}

/// Runs cases on the host CPU.
#[derive(Debug)]
pub struct Oracle {
    shared: Mapping,
    areas: Areas,
    fsgsbase: bool,
    legacy: Result<(), String>,
}

impl Oracle {
    /// Prepares shared memory, and this process's LDT, which the children inherit.
    ///
    /// # Errors
    /// [`OracleError::Memory`] if the host has no memory to share.
    pub fn new() -> Result<Self, OracleError> {
        /// `AT_HWCAP2` bit: RDFSBASE and its like are enabled.
        const HWCAP2_FSGSBASE: u64 = 2;
        // Before the first fork, since building them allocates.
        crate::background::get(0);
        // SAFETY: reads the auxiliary vector.
        let fsgsbase = unsafe { libc::getauxval(libc::AT_HWCAP2) } & HWCAP2_FSGSBASE != 0;
        Ok(Self {
            shared: Mapping::new().map_err(OracleError::Memory)?,
            areas: Areas::detect(),
            fsgsbase,
            legacy: install_ldt(),
        })
    }

    /// Whether code of `mode` can be run; otherwise why not.
    ///
    /// # Errors
    /// The reason, to be printed.
    pub fn supports(&self, mode: Mode) -> Result<(), &str> {
        match (&self.legacy, mode) {
            (Err(reason), Mode::Bits16 | Mode::Bits32) => Err(reason),
            _ => Ok(()),
        }
    }

    /// Whether RDFSBASE and its like may be executed by user code.
    pub fn has_fsgsbase(&self) -> bool {
        self.fsgsbase
    }

    /// Runs one case.
    ///
    /// # Errors
    /// [`OracleError`] if there can be no child. What happens to the case itself is in the outcome.
    pub fn run(&mut self, case: &Case) -> Result<Outcome, OracleError> {
        let mut outcomes = self.run_all(std::slice::from_ref(case))?;
        Ok(outcomes.remove(0))
    }

    /// Runs many cases; the outcomes are in their order.
    ///
    /// # Errors
    /// As [`Oracle::run`].
    pub fn run_all(&mut self, cases: &[Case]) -> Result<Vec<Outcome>, OracleError> {
        let mut outcomes = Vec::with_capacity(cases.len());
        for batch in cases.chunks(BATCH) {
            self.run_batch(batch, TICK_MICROSECONDS, &mut outcomes)?;
        }
        for (case, outcome) in cases.iter().zip(&mut outcomes) {
            self.run_hung_again(case, outcome)?;
        }
        Ok(outcomes)
    }

    /// Runs a case that hung once more, with more patience. A locked access over two cache lines stops the whole
    /// host for a while, for which a hypervisor may hold back its guest ("bus lock VM exits"): time that passes for the case's own.
    fn run_hung_again(&mut self, case: &Case, outcome: &mut Outcome) -> Result<(), OracleError> {
        if outcome.end != End::Hung {
            return Ok(());
        }
        let mut again = Vec::with_capacity(1);
        self.run_batch(std::slice::from_ref(case), PATIENT_TICK_MICROSECONDS, &mut again)?;
        if let Some(again) = again.pop() {
            *outcome = again;
        }
        Ok(())
    }

    fn run_batch(
        &mut self,
        batch: &[Case],
        tick: u32,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), OracleError> {
        let shared = self.shared.get();
        shared.cases[..batch.len()].clone_from_slice(batch);
        shared.records[..batch.len()].iter_mut().for_each(|record| record.end = END_NONE);
        shared.count.store(batch.len() as u32, Ordering::Relaxed);
        shared.tick.store(tick, Ordering::Relaxed);
        let mut next = 0;
        while next < batch.len() {
            self.shared.get().current.store(next as u32, Ordering::Relaxed);
            self.run_child()?;
            let shared = self.shared.get();
            // A child that died did so in the case it was at.
            let reached = shared.current.load(Ordering::Relaxed) as usize;
            next = reached.clamp(next, batch.len()) + usize::from(reached < batch.len());
        }
        outcomes.extend(self.shared.get().records[..batch.len()].iter().map(outcome));
        Ok(())
    }

    fn run_child(&mut self) -> Result<(), OracleError> {
        let shared = self.shared.get();
        shared.step.store(Step::Start as u32, Ordering::Relaxed);
        let pointer = self.shared.pointer().as_ptr();
        // SAFETY: the child calls only `child::run`, which takes no lock and allocates nothing.
        let child = unsafe { libc::fork() };
        if child < 0 {
            return Err(OracleError::Fork(std::io::Error::last_os_error()));
        }
        if child == 0 {
            // SAFETY: just forked, one thread, and the mapping was inherited.
            unsafe { child::run(pointer, self.areas, self.fsgsbase) }
        }
        let mut status = 0;
        // SAFETY: waits for our own child; it is bound to end, by its own deadline at the latest.
        while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {
            let error = std::io::Error::last_os_error();
            if error.kind() != std::io::ErrorKind::Interrupted {
                return Err(OracleError::Fork(error));
            }
        }
        let shared = self.shared.get();
        let step = shared.step.load(Ordering::Relaxed);
        if step < Step::Running as u32 {
            let error = std::io::Error::from_raw_os_error(shared.errno.load(Ordering::Relaxed) as i32);
            return Err(OracleError::Child { step: Step::name(step), error });
        }
        Ok(())
    }
}

/// User CPU time after which a case counts as hung, between one and two of these.
const TICK_MICROSECONDS: u32 = 20_000;
/// The same for a case that is run again; stalls of a quarter of a second were seen.
const PATIENT_TICK_MICROSECONDS: u32 = 900_000;
const PAGE_FAULT: u32 = 14;

fn outcome(record: &Record) -> Outcome {
    let end = match record.end {
        END_EXCEPTION => End::Exception {
            vector: record.vector as u8,
            error: record.error as u32,
            // The kernel reports the address of the last page fault with any exception.
            address: if record.vector == PAGE_FAULT { record.address } else { 0 },
        },
        END_SYSTEM_CALL => End::SystemCall,
        END_HUNG => End::Hung,
        _ => End::Lost,
    };
    let (start, len) = (record.change_start as usize, record.change_len as usize);
    let bytes = record.change.get(start..start.saturating_add(len).min(DATA_LEN)).unwrap_or(&[]);
    Outcome {
        end,
        gpr: record.gpr,
        rip: record.rip,
        rflags: record.rflags,
        segments: record.segments,
        fs_base: record.fs_base,
        gs_base: record.gs_base,
        vectors: record.vectors.clone(),
        memory: (len != 0).then(|| Change { offset: start, bytes: bytes.to_vec() }),
    }
}

/// Sets the LDT of this process to [`LDT`].
fn install_ldt() -> Result<(), String> {
    /// `struct user_desc` of `asm/ldt.h`.
    #[repr(C)]
    struct UserDescriptor {
        entry: u32,
        base: u32,
        limit: u32,
        flags: u32,
    }
    const WRITE: libc::c_int = 0x11;
    for (entry, segment) in LDT.iter().enumerate() {
        let Segment { base, limit, .. } = *segment;
        let bit = |set: bool, position: u32| u32::from(set) << position;
        let paged = segment.has(attribute::GRANULARITY);
        let flags = bit(segment.has(attribute::DB), 0)
            | (u32::from(segment.kind()) >> 2 & 3) << 1
            | bit(!segment.has(attribute::READ_WRITE), 3)
            | bit(paged, 4)
            | bit(!segment.has(attribute::PRESENT), 5);
        let limit = if paged { limit >> 12 } else { limit };
        let descriptor = UserDescriptor { entry: entry as u32, base: base as u32, limit, flags };
        // SAFETY: changes this process's LDT, which nothing in a 64-bit program uses; the structure is as the call
        // wants it.
        let result = unsafe {
            libc::syscall(libc::SYS_modify_ldt, WRITE, &raw const descriptor, size_of::<UserDescriptor>())
        };
        // The call returns its negative error as an unsigned 32-bit number, which the C library takes for success.
        if result as i32 != 0 {
            let error = match result {
                -1 => std::io::Error::last_os_error(),
                _ => std::io::Error::from_raw_os_error((result as i32).wrapping_neg()),
            };
            return Err(format!("modify_ldt refused entry {entry}: {error}"));
        }
    }
    Ok(())
}
