//! The translator: guest instructions, of 64-bit code and of flat 32-bit code, become host instructions of the same set, in 64-bit mode.
//!
//! A *region* is instructions of one page that lead to each other ([`region`]). When its first has been executed often
//! enough by the interpreter it is translated ([`emit`], [`cold`], [`operand`], [`special`], [`system`]) to code that keeps
//! guest registers in host registers ([`registers`]), guest flags in host flags ([`flags`]) and, from where they are first
//! used, vector registers in vector registers ([`vector`], [`gather`]) and x87 state in the host's unit ([`x87`]). Addresses go through the
//! interpreter's own soft TLB by a check in line, one for a row of neighbours ([`group`]) or for many iterations of a small loop
//! ([`loops`], [`laps`]), along which guest registers without a host register are kept in scratch ones ([`kept`]); the stack's page is remembered
//! apart ([`special`]). What misses, by way of
//! fixed code ([`misses`]), and every instruction that is not in the table ([`native`]), runs by the interpreter's handler, called from
//! translated code ([`helper`]). So whatever the interpreter can do, translated code can.
//!
//! * Regions are found by physical address and mode ([`mode`]): the same bytes are other instructions in 32-bit code. Nothing in them depends on where the page is mapped or on privilege: the
//!   linear address of the page is a field of the vCPU ([`state`]), the soft TLB's tables are selected by class.
//! * A direct branch is linked to its target's code once that exists; one to another page first makes sure by one
//!   comparison that the same physical page is there ([`links::Crossing`]). Any other branch looks its target up in a
//!   table, in translated code: by the soft TLB, then by physical address ([`stubs`]). A return is expected to come back
//!   to where the call was, as the host's own is.
//! * Every unit of a region takes its length off a budget when it is entered and gives back what it did not execute. A run
//!   never exceeds its budget, and the count of retired instructions is exact wherever Rust sees it.
//! * A system call and the return from one ([`privilege`]), the return from an interrupt ([`interrupt_return`]) and the like go on in
//!   translated code, unless something waits for the run loop; so do exceptions, once [`helper`] has had them delivered. The
//!   time-stamp counter is read there too ([`time`]).
//! * A floating-point exception that the guest does not mask is the host's own ([`unmasked`]): a SIMD exception in the same instruction, one of the
//!   x87 unit behind it ([`x87`]).
//! * When bytes are written that a region was made from, its links are undone and it is forgotten ([`cache`]).
//!
//! 16-bit code runs in the interpreter, and 32-bit code that does not see memory as one flat space.

mod apart;
mod asm;
mod cache;
mod cold;
mod compat;
mod emit;
mod enter;
mod facts;
mod flags;
mod gate;
mod gather;
mod group;
mod helper;
mod interrupt_return;
mod kept;
mod laps;
mod links;
mod loops;
mod misses;
mod mode;
mod mxcsr;
mod native;
mod operand;
mod output;
mod plain;
mod privilege;
mod region;
mod registers;
mod rewrite;
#[cfg(test)]
pub(crate) mod seeded;
mod single;
mod span;
mod special;
mod state;
mod step;
mod string;
mod stubs;
mod system;
mod taker;
#[cfg(test)]
mod tests;
mod time;
mod unmasked;
mod vector;
mod x87;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use ringfence_memory::GuestAddress;
use ringfence_x86::Exception;

use crate::code::{CodeMap, StaleCode};
use crate::codemem::CodeMemoryError;
use crate::interp::code_address::CodeAddress;
use crate::interp::cpu::Cpu;
use crate::interp::decode::translate_fetch;
use crate::interp::op::RIP;
use crate::interp::run::Interpreter;
use cache::{Cache, Entry};
use facts::Forms;
pub(crate) use gather::Lanes;
pub(crate) use helper::handed;
use mode::Mode;
use native::Host;
use region::{Circumstances, Known, Source};
pub(crate) use single::{HostCode, Next};
pub use state::State;
use stubs::reason;

/// The least code memory: some forty regions, so that a guest gets nowhere fast but everything works.
pub const SMALLEST_CODE: usize = 128 << 10;
/// What it is if nobody asks: a boot and a compiler need some 50 MiB.
pub const DEFAULT_CODE: usize = 128 << 20;
/// The most: branches reach 2 GiB.
pub const LARGEST_CODE: usize = 1 << 30;

/// What the translator may do.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Most bytes of translated code, from [`SMALLEST_CODE`] to [`LARGEST_CODE`]; other sizes become the nearest of these.
    /// When it is full, everything is dropped and translated anew.
    pub code_size: usize,
    /// Executions after which a block is translated, at most 200.
    pub threshold: u8,
    /// Most instructions in a region, from 1 to 1000.
    pub region: usize,
    /// Instructions of a region behind which it no longer goes on where a conditional branch is not taken, unless that has been
    /// executed.
    pub ample: usize,
    /// Keep every arithmetic flag exact wherever the guest can be interrupted, even if the guest's code will overwrite it
    /// unread. Slower; for comparisons with the interpreter.
    pub exact_flags: bool,
    /// Find out where the guest's instructions are, and which are handed to handlers.
    pub profile: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            code_size: DEFAULT_CODE,
            threshold: 4,
            region: 256,
            ample: 48,
            exact_flags: false,
            profile: false,
        }
    }
}

/// Why the translator is not available.
#[derive(Debug, thiserror::Error)]
pub enum JitError {
    /// The host gives no memory for code.
    #[error(transparent)]
    Memory(#[from] CodeMemoryError),
    /// The host's processor lacks an instruction.
    #[error(
        "the host's processor has no LAHF in 64-bit mode, which the translator needs; use the interpreter"
    )]
    NoLahf,
}

/// Most instructions between two returns to Rust. Each may be a call of the guest, for which two words are kept on the
/// stack: 1 MiB of the 2 that a thread has.
const MAX_RUN: u64 = 1 << 16;
/// More generations of the soft TLB than such a run can make.
const MARGIN: u32 = 1 << 20;
/// More than any unit is long.
pub(crate) const MAX_UNIT: u64 = 1 << 10;
/// The inbox of a vCPU that has none.
static NOTHING_PENDING: AtomicU32 = AtomicU32::new(0);
/// Entries of the table that counts executions.
const HEAT: usize = 1 << 14;
/// Most addresses remembered as those of code that cannot be translated. Others are tried again and again, slowly.
const MAX_NEVER: usize = 1 << 16;
/// Most pages whose code is careful.
const MAX_CAREFUL: usize = 1 << 16;

/// What the host's processor has, if that is enough.
fn host() -> Result<Host, JitError> {
    let host = Host::detect();
    if host.lahf { Ok(host) } else { Err(JitError::NoLahf) }
}

/// Whether this host can run translated code.
///
/// # Errors
/// What it lacks.
pub fn check_host() -> Result<(), JitError> {
    host()?;
    crate::codemem::CodeMemory::new(1)?;
    Ok(())
}

/// Where executions of the block at an address are counted.
fn heat_index(address: GuestAddress) -> usize {
    (address.0 ^ address.0 >> 14) as usize % HEAT
}

/// How far the addresses are from those that are not canonical that branches within `reach` bytes must not start at.
fn hole(reach: u64) -> std::ops::Range<u64> {
    // A region's page, and an instruction that runs out of it.
    let reach = reach + 0x2000;
    (1 << 47) - reach..(u64::MAX << 47) + reach
}

/// Whether a direct branch from `linear` can reach an address that is not canonical. The branch itself must raise the
/// exception then; translated code would only notice at the target.
fn near_hole(linear: u64) -> bool {
    hole(1 << 31).contains(&linear)
}

/// Whether an address is in the last page of 4 GiB: behind it, 32-bit code finds the end of its segment.
fn is_last_of_32_bits(linear: u64) -> bool {
    linear >> 12 == 0xf_ffff
}

/// How far most branches go at most. Without address space randomisation, Linux has a program's libraries within 2 GiB of the
/// hole, though not within this.
const NEAR: u64 = 64 << 20;

/// Whether translated code must not run at a linear address that fetches from `address`.
pub(crate) fn must_interpret(cpu: &Cpu, linear: u64, address: GuestAddress) -> bool {
    is_last_of_32_bits(linear)
        || near_hole(linear)
            && (hole(NEAR).contains(&linear) || cpu.translated.far_pages.contains(&address.page()))
}

/// The translator of one vCPU.
#[derive(Debug)]
pub struct Jit {
    options: Options,
    forms: Forms,
    /// The region being translated.
    source: Source,
    /// The row being translated apart.
    row: Source,
    cache: Cache,
    /// Stale code, as the code map tells.
    stale: Arc<StaleCode>,
    heat: Box<[u8]>,
    /// Addresses of code that could not be translated.
    never: HashSet<CodeAddress>,
    /// Pages whose code is careful ([`x87`]).
    careful: HashSet<GuestAddress>,
    /// The upper bit of the soft TLB's newest generation: code knows the others.
    generations: u32,
    exits: [u64; reason::COUNT],
    /// Instructions executed by translated code, those that it handed to handlers included.
    executed: u64,
    /// Time spent on translation.
    translating: Duration,
    /// A mistake made on purpose, for tests of what should catch it.
    #[cfg(test)]
    pub(crate) seeded: Option<seeded::SeededBug>,
}

impl Jit {
    /// A translator for a vCPU that hears of stale code from `code`. It has no code yet.
    ///
    /// # Errors
    /// If the host offers no memory for code, or its processor is too old.
    pub fn new(options: Options, code: &CodeMap) -> Result<Self, JitError> {
        let host = host()?;
        let cache = Cache::new(options.code_size)?;
        let heat = vec![0; HEAT].into_boxed_slice();
        Ok(Self {
            options,
            forms: Forms::new(host),
            source: Source::default(),
            row: Source::default(),
            cache,
            stale: code.register(),
            heat,
            never: HashSet::new(),
            careful: HashSet::new(),
            generations: 0,
            exits: [0; reason::COUNT],
            executed: 0,
            translating: Duration::ZERO,
            #[cfg(test)]
            seeded: None,
        })
    }

    /// Executes up to `limit` instructions at RIP, but at least one. Returns early wherever [`Interpreter::run_block`] would, after
    /// any block that the interpreter executed, and where less than [`MAX_UNIT`] are left.
    ///
    /// # Errors
    /// The exception that an instruction raised, not delivered; RIP points at the instruction then.
    pub fn run(&mut self, interpreter: &mut Interpreter, limit: u64) -> Result<(), Exception> {
        let as_limit = |left: u64| usize::try_from(left).unwrap_or(usize::MAX);
        if interpreter.cpu.mode().is_none() {
            return interpreter.run_block(as_limit(limit));
        }
        self.renew_generations(&mut interpreter.cpu);
        let mut left = limit;
        let mut link = None;
        while left > 0 {
            let Some(entry) = self.code_at_rip(&mut interpreter.cpu)? else {
                return interpreter.run_block(as_limit(left));
            };
            if let Some((link, flushes)) = link.take()
                && self.cache.chaining
                && self.cache.sizes.flushes == flushes
            {
                self.cache.connect(link, entry);
            }
            let cpu = &mut interpreter.cpu;
            let reason = self.enter(cpu, entry, &mut left);
            self.exits[reason as usize % reason::COUNT] += 1;
            match reason {
                reason::FAULT => return cpu.translated.exception.take().map_or(Ok(()), Err),
                reason::BUDGET if left == 0 => return Ok(()),
                // The caller decides whether so few are worth being interpreted; unless there were no more from the start.
                reason::BUDGET if left < MAX_UNIT && left < limit => return Ok(()),
                reason::BUDGET if left < MAX_UNIT => return interpreter.run_block(as_limit(left)),
                reason::INTERPRET => return interpreter.run_block(as_limit(left)),
                reason::BUDGET | reason::LOOKUP => {}
                reason::CAREFUL => self.take_care(&mut interpreter.cpu)?,
                reason::LINK => {
                    link = Some((cpu.translated.link, self.cache.sizes.flushes));
                    self.follow_link(cpu);
                }
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    /// Drops regions whose bytes have changed.
    #[inline(always)]
    fn drop_stale(&mut self, cpu: &mut Cpu) {
        if self.stale.any() {
            cpu.translated.epoch = cpu.translated.epoch.wrapping_add(1);
            for (page, mask) in self.stale.take() {
                self.cache.invalidate(page, mask);
                self.never.retain(|address| address.page().physical() != page);
            }
        }
    }

    /// The code of the page that RIP is in is careful from now on: what there is of it is dropped.
    fn take_care(&mut self, cpu: &mut Cpu) -> Result<(), Exception> {
        let page = GuestAddress(translate_fetch(cpu, cpu.regs[RIP])?.0 & !0xfff);
        if self.careful.len() >= MAX_CAREFUL {
            // What is dropped now comes back as its code is run.
            self.careful.clear();
        }
        self.careful.insert(page);
        cpu.translated.epoch = cpu.translated.epoch.wrapping_add(1);
        self.cache.invalidate(page, u64::MAX);
        Ok(())
    }

    /// Drops all code before generations that it knows come again: code has room for 31 bits of them. A run makes fewer of them than
    /// [`MARGIN`].
    fn renew_generations(&mut self, cpu: &mut Cpu) {
        let generations = cpu.tlb.generations_made().wrapping_add(MARGIN) >> 31;
        if self.generations != generations {
            self.generations = generations;
            cpu.tlb.renew_generations();
            self.cache.flush();
        }
    }

    /// Runs translated code with a budget of `left` instructions, which becomes what is left of it.
    fn enter(&mut self, cpu: &mut Cpu, entry: Entry, left: &mut u64) -> u64 {
        let budget = (*left).min(MAX_RUN) as i64;
        cpu.leave_block = false;
        cpu.select_tables();
        cpu.find_stack();
        cpu.prepare_privileges();
        cpu.translated.inbox = match &cpu.apic {
            Some(apic) => apic.inbox().pending_word().as_ptr() as u64,
            None => NOTHING_PENDING.as_ptr() as u64,
        };
        if cpu.translated.stale.is_none() {
            cpu.translated.stale = Some(Arc::clone(&self.stale));
            cpu.translated.stale_flag = self.stale.flag().as_ptr() as u64;
        }
        let state = &mut cpu.translated;
        state.entry = self.cache.entry(entry);
        state.jumps = self.cache.jumps();
        state.interpret = if self.options.profile {
            state.handed.resize(iced_x86::Code::values().len(), 0);
            helper::interpret_counted as *const () as u64
        } else {
            helper::interpret as *const () as u64
        };
        self.cache.publish(state);
        state.apart = helper::apart as *const () as u64;
        state.arena = self.cache.host(0);
        state.writable = self.cache.writable();
        state.targets = self.cache.targets();
        state.vectors = cpu.vector.registers_address();
        state.passing = cpu.vector.passing_level().into();
        state.raised = unmasked::raised as *const () as u64;
        state.bring_x87 = helper::bring_x87 as *const () as u64;
        state.x87 = cpu.vector.x87_passes() as u64;
        state.time_line = std::ptr::from_ref(cpu.clock.line()) as u64;
        state.page = cpu.regs[RIP] & !0xfff;
        state.budget = budget;
        state.end = cpu.retired.wrapping_add(budget as u64);
        let reason = enter::enter(cpu, self);
        let rest = cpu.translated.budget;
        cpu.retired = cpu.translated.end.wrapping_sub(rest as u64);
        let executed = (budget - rest) as u64;
        self.executed += executed;
        *left -= executed;
        reason
    }

    /// Puts RIP where the link leads through which translated code was left.
    fn follow_link(&self, cpu: &mut Cpu) {
        if let Some(target) = self.cache.link_target(cpu.translated.link) {
            let mask = if cpu.is_64bit() { u64::MAX } else { 0xffff_ffff };
            cpu.regs[RIP] = cpu.translated.page.wrapping_add(target as u64) & mask;
        }
    }

    /// The code for what is at RIP, translated now if it is due; `None` if the interpreter is to run it.
    fn code_at_rip(&mut self, cpu: &mut Cpu) -> Result<Option<Entry>, Exception> {
        let linear = cpu.regs[RIP];
        let Some(mode) = cpu.mode() else { return Ok(None) };
        if mode == Mode::Flat32 && linear > 0xffff_ffff {
            // The interpreter knows what there is behind the end of the segment.
            return Ok(None);
        }
        let address = translate_fetch(cpu, linear)?;
        // After the walk, which may have written to code.
        self.drop_stale(cpu);
        if must_interpret(cpu, linear, address) {
            return Ok(None);
        }
        let code = mode.at(address);
        if let Some(entry) = self.cache.jump(code) {
            return Ok(Some(entry));
        }
        let Some(entry) = self.cache.find(code).or_else(|| self.warm(cpu, code)) else {
            return Ok(None);
        };
        if must_interpret(cpu, linear, address) {
            return Ok(None);
        }
        if self.cache.chaining {
            self.cache.remember(code, entry);
        }
        Ok(Some(entry))
    }

    /// Counts an execution of the block at `address`, and translates it if it is due.
    fn warm(&mut self, cpu: &mut Cpu, address: CodeAddress) -> Option<Entry> {
        let index = heat_index(address.physical());
        let heat = &mut self.heat[index];
        *heat = heat.saturating_add(1);
        if *heat < self.options.threshold || self.never.contains(&address) {
            return None;
        }
        let entry = self.translate_now(cpu, address, |counts, address| counts[heat_index(address)] != 0);
        self.heat[index] = 0;
        if entry.is_none() && self.never.len() < MAX_NEVER {
            self.never.insert(address);
        }
        entry
    }

    /// Translates the region at `address`. `executed` tells whether the interpreter has executed other code, from the counts
    /// of executions.
    fn translate_now(
        &mut self,
        cpu: &mut Cpu,
        address: CodeAddress,
        executed: impl Fn(&[u8], GuestAddress) -> bool,
    ) -> Option<Entry> {
        let page = address.page();
        let (cache, counts) = (&self.cache, &self.heat);
        let known = Known::new(cache, page, |address| executed(counts, address));
        let start = Instant::now();
        let (forms, options, straight) = (&mut self.forms, &self.options, !self.cache.chaining);
        let careful = self.careful.contains(&page.physical());
        let decoded =
            self.source.decode(cpu, address, Circumstances { forms, options, straight, careful, known });
        #[cfg(test)]
        seeded::seed(self.seeded, &mut self.source);
        let entry = decoded.and_then(|()| self.cache.translate(&self.source));
        let far = entry.is_some() && !address.is_narrow() && self.source.reach() > NEAR;
        if far && cpu.translated.far_pages.insert(page.physical()) {
            // Near the hole, no fetch must lead to this page any more.
            cpu.tlb.forget_all();
        }
        self.translating += start.elapsed();
        entry
    }

    /// Translates the region at a physical address, whose linear address is in RIP, if there is no code for it. `executed` tells
    /// which other code of its page counts as executed. For measurements: [`Jit::run`] translates what is due by itself.
    #[inline(never)]
    pub fn translate(
        &mut self,
        cpu: &mut Cpu,
        address: GuestAddress,
        executed: impl Fn(GuestAddress) -> bool,
    ) {
        let Some(address) = cpu.mode().map(|mode| mode.at(address)) else { return };
        if self.cache.find(address).is_none() {
            let _ = self.translate_now(cpu, address, |_, other| executed(other));
        }
    }

    /// Whether a profile was asked for.
    pub(crate) fn profiles(&self) -> bool {
        self.options.profile
    }

    /// Forgets all translated code.
    pub fn clear(&mut self) {
        self.cache.flush();
        self.heat.fill(0);
        self.never.clear();
        self.careful.clear();
    }

    /// Named figures for `-v`.
    pub fn counters(&self, cpu: &Cpu) -> Vec<(&'static str, u64)> {
        let sizes = &self.cache.sizes;
        let nanoseconds = u64::try_from(self.translating.as_nanos()).unwrap_or(u64::MAX);
        let handed = cpu.translated.interpreted;
        let interpreted = cpu.retired.saturating_sub(self.executed).saturating_add(handed);
        let per = |part: u64, unit: u64, whole: u64| {
            u64::try_from(u128::from(part) * u128::from(unit) / u128::from(whole.max(1))).unwrap_or(u64::MAX)
        };
        let often = sizes.host_bytes - sizes.rare_bytes;
        vec![
            ("regions translated", sizes.regions),
            ("instructions translated", sizes.instructions),
            ("of these by handlers", sizes.interpreted),
            ("microseconds spent translating", nanoseconds / 1000),
            ("nanoseconds per instruction translated", per(nanoseconds, 1, sizes.instructions)),
            ("bytes of guest code translated", sizes.guest_bytes),
            ("bytes of host code", sizes.host_bytes),
            ("of these rarely executed", sizes.rare_bytes),
            ("rows translated apart", sizes.apart),
            ("bytes of host code often executed, per 100 of guest code", per(often, 100, sizes.guest_bytes)),
            (
                "bytes of host code rarely executed, per 100 of guest code",
                per(sizes.rare_bytes, 100, sizes.guest_bytes),
            ),
            ("bytes of host code per 100 guest instructions", per(sizes.host_bytes, 100, sizes.instructions)),
            ("regions invalidated", sizes.invalidated),
            ("links made", sizes.links),
            ("code memory flushes", sizes.flushes),
            ("handlers called from translated code", handed),
            ("instructions interpreted, those by handlers included", interpreted),
            ("instructions interpreted per million executed", per(interpreted, 1_000_000, cpu.retired)),
            ("exits: left by a handler", self.exits[reason::LEAVE as usize]),
            ("exits: fault", self.exits[reason::FAULT as usize]),
            ("exits: budget", self.exits[reason::BUDGET as usize]),
            ("exits: target unknown", self.exits[reason::LOOKUP as usize]),
            ("exits: link not made", self.exits[reason::LINK as usize]),
        ]
    }
}
