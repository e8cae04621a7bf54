//! What is translated at once: instructions of one page that lead to each other.
//!
//! From its first instruction a region follows the code past branches not taken (once it is long, only where that has been executed), behind
//! calls, and to targets of branches that have been seen to be taken; not into code where another region starts. It is a list of *runs*, in each of which every instruction follows the one before. An
//! instruction that something else in the region leads to has a *label*.
//!
//! Instructions are taken off the budget by *units*: a unit is entered at its first instruction only.

use std::collections::VecDeque;
use std::sync::Arc;

use ringfence_memory::GuestAddress;

use super::cache::{Cache, Page};
use super::facts::Forms;
use super::flags::{self, Set};
use super::native::Kind;
use super::step::{Step, Steps};
use super::taker::{Taker, flags_wanted};
use super::{MAX_UNIT, Options};
use crate::code::granules;
use crate::interp::code_address::CodeAddress;
use crate::interp::code_runs::{begin, decode_run, decode_straddling};
use crate::interp::cpu::Cpu;
use crate::interp::features::Features;
use crate::interp::found::decode_again;
use crate::interp::op::RIP;
use iced_x86::Instruction;

/// What is known of the code of a page.
pub(super) struct Known<'a, E> {
    cache: &'a Cache,
    page: Option<&'a Page>,
    address: CodeAddress,
    /// Whether the interpreter has executed the code at an address.
    executed: E,
}

impl<E> std::fmt::Debug for Known<'_, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Known").field("page", &self.page).finish_non_exhaustive()
    }
}

impl<'a, E: Fn(GuestAddress) -> bool> Known<'a, E> {
    pub(super) fn new(cache: &'a Cache, address: CodeAddress, executed: E) -> Self {
        Self { cache, page: cache.page(address), address, executed }
    }

    /// Whether there is code for what is at an offset in the page.
    pub(super) fn is_translated(&self, offset: u32) -> bool {
        self.page.is_some_and(|page| page.has(offset))
    }

    /// The flags wanted there, if there is code for it.
    fn wanted(&self, offset: u32) -> Option<Set> {
        let entry = self.is_translated(offset).then(|| self.cache.find(self.at(offset))).flatten();
        entry.map(|entry| entry.wanted)
    }

    /// Whether it has been executed, but not translated.
    pub(super) fn is_executed(&self, offset: u32) -> bool {
        !self.is_translated(offset) && (self.executed)(self.at(offset).physical())
    }

    fn at(&self, offset: u32) -> CodeAddress {
        self.address.in_page(offset)
    }
}

/// What [`Source`] knows of an offset in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place(u16);

impl Place {
    const NOTHING: Self = Self(u16::MAX);
    /// Marks a set of flags.
    const OUTSIDE: u16 = 1 << 15;

    /// A step starts there.
    fn step(index: usize) -> Self {
        Self(index as u16)
    }

    /// A branch leads there, out of the region, and these flags are wanted.
    fn outside(wanted: Set) -> Self {
        Self(Self::OUTSIDE | u16::from(wanted))
    }

    fn as_step(self) -> Option<usize> {
        (self.0 < Self::OUTSIDE).then_some(usize::from(self.0))
    }

    /// The flags wanted there if it is outside.
    fn wanted(self) -> Set {
        if self == Self::NOTHING { flags::ALL } else { (self.0 & !Self::OUTSIDE) as Set }
    }
}

/// A decoded region; its memory is used again for the next.
#[derive(Debug)]
pub(super) struct Source {
    /// Where its first instruction is.
    pub(super) address: CodeAddress,
    pub(super) steps: Steps,
    /// Direct branches and calls, and the last steps of runs, in order.
    pub(super) leads: Vec<u16>,
    /// What the vCPU's model offers.
    features: Option<Arc<Features>>,
    /// What is known of every offset in the page.
    places: Box<[Place; 0x1000]>,
    /// Offsets in the page where branches lead to out of the region.
    outside: Vec<u32>,
    /// Offsets from which to decode on.
    ahead: VecDeque<u32>,
    /// The page in which its only instruction ends, if that is not the one in which it starts.
    pub(super) second: Option<GuestAddress>,
    /// Granules of the page that it was made from.
    pub(super) granules: u64,
    /// Bytes of guest code.
    pub(super) bytes: u32,
    /// Most instructions of any region, and so of any unit.
    pub(super) most: usize,
    exact: bool,
    /// Something leads backwards.
    loops: bool,
    /// See [`Source::decode`].
    straight: bool,
    /// It is to run where some x87 exception is not masked ([`super::x87`]).
    pub(super) careful: bool,
}

impl Default for Source {
    fn default() -> Self {
        Self {
            address: CodeAddress::new(GuestAddress(0), false),
            steps: Steps::default(),
            leads: Vec::new(),
            features: None,
            places: Box::new([Place::NOTHING; 0x1000]),
            outside: Vec::new(),
            ahead: VecDeque::new(),
            second: None,
            granules: 0,
            bytes: 0,
            most: MAX_UNIT as usize,
            exact: false,
            loops: false,
            straight: false,
            careful: false,
        }
    }
}

/// What decoding depends on besides the code.
#[derive(Debug)]
pub(super) struct Circumstances<'a, E> {
    pub(super) forms: &'a mut Forms,
    pub(super) options: &'a Options,
    /// See [`Source::decode`].
    pub(super) straight: bool,
    /// See [`Source::careful`].
    pub(super) careful: bool,
    pub(super) known: Known<'a, E>,
}

impl Source {
    /// Decodes the region that starts at `address`; `None` if its first instruction cannot be decoded within the page.
    ///
    /// A `straight` region is one run, in which no branch stays: it leads out wherever it goes.
    ///
    /// With exact flags, every flag counts as looked at wherever the guest could be interrupted: an exception's frame shows
    /// them all. Otherwise flags that the guest's code will overwrite unread may be stale in such a frame.
    pub(super) fn decode(
        &mut self,
        cpu: &mut Cpu,
        address: CodeAddress,
        mut with: Circumstances<'_, impl Fn(GuestAddress) -> bool>,
    ) -> Option<()> {
        self.reset(cpu, address);
        (self.exact, self.straight, self.careful) = (with.options.exact_flags, with.straight, with.careful);
        self.most = with.options.region;
        self.ahead.push_back(address.page_offset() as u32);
        while let Some(offset) = self.ahead.pop_front() {
            let wanted =
                self.steps.is_empty() || self.find(offset).is_none() && !with.known.is_translated(offset);
            if wanted && self.steps.len() < with.options.region {
                self.decode_run(cpu, offset, &mut with);
            }
            if self.straight {
                break;
            }
        }
        if self.steps.is_empty() {
            self.decode_straddling(cpu, with.forms, with.options)?;
        }
        self.put_labels();
        if !self.exact {
            self.look_outside(cpu, &mut with);
        }
        self.put_wanted();
        self.put_units();
        if self.exact {
            self.put_wanted();
        }
        Some(())
    }

    /// Decodes at most `most` instructions that follow each other, without a look at what is around them. Whether it is to be
    /// [`Source::careful`] has been said.
    pub(super) fn decode_steps(
        &mut self,
        cpu: &mut Cpu,
        address: CodeAddress,
        most: usize,
        forms: &mut Forms,
        options: &Options,
    ) {
        self.reset(cpu, address);
        (self.exact, self.straight) = (options.exact_flags, false);
        let next = address.page_offset() as u32;
        let mut taker =
            Taker { source: self, forms, options, next, known: None::<&Known<'_, fn(GuestAddress) -> bool>> };
        decode_run(cpu, address, most, &mut taker);
    }

    /// Forgets the last region.
    fn reset(&mut self, cpu: &mut Cpu, address: CodeAddress) {
        begin(cpu);
        if self.features.is_none() {
            self.features = Some(Arc::clone(&cpu.features));
        }
        for step in self.steps.iter() {
            self.places[step.start() as usize] = Place::NOTHING;
        }
        for &offset in &self.outside {
            self.places[offset as usize] = Place::NOTHING;
        }
        self.steps.clear();
        self.leads.clear();
        self.outside.clear();
        self.ahead.clear();
        self.address = address;
        (self.second, self.granules, self.bytes) = (None, 0, 0);
    }

    /// Notes that the next step starts at an offset in the page. No instruction starts behind it.
    #[inline(always)]
    pub(super) fn put_place(&mut self, start: u32) {
        self.places[start as usize % 0x1000] = Place::step(self.steps.len());
    }

    /// The instruction of step `i`, as if it were at zero.
    pub(super) fn instruction(&self, i: usize) -> Instruction {
        let step = &self.steps[i];
        match &self.features {
            Some(features) => decode_again(&step.bytes, step.length, self.address.is_narrow(), features),
            None => Instruction::default(),
        }
    }

    /// The step at an offset in the page.
    pub(super) fn find(&self, offset: u32) -> Option<usize> {
        self.places.get(offset as usize)?.as_step()
    }

    /// The step that a relative branch leads to, if it is in the region.
    pub(super) fn inside(&self, target: i64) -> Option<usize> {
        u32::try_from(target).ok().filter(|_| !self.straight).and_then(|offset| self.find(offset))
    }

    fn decode_run(
        &mut self,
        cpu: &mut Cpu,
        offset: u32,
        with: &mut Circumstances<'_, impl Fn(GuestAddress) -> bool>,
    ) {
        let start = self.address.in_page(offset);
        let most = with.options.region - self.steps.len();
        let (forms, options) = (&mut *with.forms, with.options);
        let mut taker = Taker { source: self, forms, options, next: offset, known: Some(&with.known) };
        decode_run(cpu, start, most, &mut taker);
        let next = taker.next;
        if next != offset {
            self.bytes += next - offset;
            self.granules |= granules(offset.into(), (next - offset).into());
            self.end_run();
        }
    }

    /// The last step is the last of its run.
    fn end_run(&mut self) {
        if let Some(step) = self.steps.last_mut() {
            step.last = true;
            let index = (self.steps.len() - 1) as u16;
            if self.leads.last() != Some(&index) {
                self.leads.push(index);
            }
        }
    }

    /// Notes from where to decode on because of an instruction with a target that ends at `next`.
    #[inline(always)]
    pub(super) fn look_ahead(
        &mut self,
        kind: Kind,
        target: i64,
        next: u32,
        known: &Known<'_, impl Fn(GuestAddress) -> bool>,
    ) {
        let target = u32::try_from(target).ok().filter(|&target| target < 0x1000);
        match (kind, target) {
            (Kind::Branch, Some(target)) if known.is_executed(target) => self.ahead.push_back(target),
            (Kind::Jump, Some(target)) => self.ahead.push_front(target),
            (Kind::Call | Kind::CallIndirect, _) if next < 0x1000 => self.ahead.push_front(next),
            (kind, _) if (kind.is_string() || kind == Kind::PopFlags) && next < 0x1000 => {
                self.ahead.push_front(next);
            }
            _ => {}
        }
    }

    /// The one instruction of a region that ends in the next page.
    fn decode_straddling(&mut self, cpu: &mut Cpu, forms: &mut Forms, options: &Options) -> Option<()> {
        let linear = cpu.regs[RIP];
        let offset = self.address.page_offset();
        let (address, next) = (self.address, offset as u32);
        let mut taker =
            Taker { source: self, forms, options, next, known: None::<&Known<'_, fn(GuestAddress) -> bool>> };
        let second = decode_straddling(cpu, linear, address, &mut taker)?;
        self.bytes = taker.next - next;
        self.end_run();
        self.second = Some(second.page());
        self.granules = granules(offset, 0x1000 - offset);
        Some(())
    }

    /// The step that follows step `i` when it does not branch, if it is in the region.
    pub(super) fn following(&self, i: usize) -> Option<usize> {
        if self.steps[i].last { self.find(self.steps[i].next) } else { Some(i + 1) }
    }

    fn put_labels(&mut self) {
        self.loops = false;
        for lead in 0..self.leads.len() {
            let i = usize::from(self.leads[lead]);
            let step = &self.steps[i];
            let branches = matches!(step.kind, Kind::Branch | Kind::Jump);
            let taken = if branches { self.inside(step.target()) } else { None };
            let next = if step.last && step.kind != Kind::Jump { self.find(step.next) } else { None };
            for at in [taken, next].into_iter().flatten() {
                self.steps[at].label = true;
                self.loops |= at <= i;
            }
        }
    }

    fn put_units(&mut self) {
        let mut open = false;
        for i in 0..self.steps.len() {
            let step = &mut self.steps[i];
            if !open || step.label {
                step.unit = 1;
            }
            if step.kind != Kind::Branch {
                open = !step.last;
                continue;
            }
            let step = &self.steps[i];
            // Behind a branch within the region another unit starts, so that taking it needs no correction; not where that
            // would cost the flags.
            let free = self.inside(step.target()).is_some()
                && self.following(i).is_some_and(|next| self.wanted_before(next) == 0);
            open = !(step.last || free);
        }
        let mut behind = 0;
        for step in self.steps.iter_mut().rev() {
            step.behind = behind;
            behind += 1;
            if step.unit != 0 {
                step.unit = behind;
                behind = 0;
            }
        }
    }

    /// Which flags are wanted behind each step: the least solution, found by going backwards until nothing changes.
    fn put_wanted(&mut self) {
        let mut changed = true;
        while changed {
            changed = false;
            // Those wanted before the next step.
            let mut before = flags::ALL;
            for i in (0..self.steps.len()).rev() {
                let step = &self.steps[i];
                let leads = matches!(
                    step.kind,
                    Kind::Jump
                        | Kind::Branch
                        | Kind::Call
                        | Kind::CallIndirect
                        | Kind::JumpIndirect
                        | Kind::Return
                );
                let wanted = if leads || step.last || self.straight {
                    self.wanted_behind(step, before)
                } else {
                    before
                };
                // Only what a step wants that comes later is not known yet.
                changed |= wanted != step.wanted && step.label && self.loops;
                self.steps[i].wanted = wanted;
                before = self.wanted_before(i);
            }
        }
    }

    /// Flags wanted behind a step, which leads elsewhere or ends a run; `before` those before the one that is next in the list.
    fn wanted_behind(&self, step: &Step, before: Set) -> Set {
        let next = if step.last || self.straight { self.wanted_at(step.next.into()) } else { before };
        match step.kind {
            Kind::Jump => self.wanted_at(step.target()),
            Kind::Branch => self.wanted_at(step.target()) | next,
            Kind::Call | Kind::CallIndirect | Kind::JumpIndirect | Kind::Return => flags::ALL,
            _ => next,
        }
    }

    /// Flags wanted at an offset from the page's start.
    pub(super) fn wanted_at(&self, target: i64) -> Set {
        let Some(&place) = usize::try_from(target).ok().and_then(|offset| self.places.get(offset)) else {
            return flags::ALL;
        };
        match place.as_step() {
            Some(step) if !self.straight => self.wanted_before(step),
            None if !self.exact => place.wanted(),
            _ => flags::ALL,
        }
    }

    /// Looks at the code in the page that branches lead to out of the region, for the flags that it wants.
    fn look_outside(&mut self, cpu: &mut Cpu, with: &mut Circumstances<'_, impl Fn(GuestAddress) -> bool>) {
        for lead in 0..self.leads.len() {
            let step = &self.steps[usize::from(self.leads[lead])];
            let branches = matches!(step.kind, Kind::Branch | Kind::Jump);
            let passes = step.last && !matches!(step.kind, Kind::Jump | Kind::JumpIndirect | Kind::Return);
            let targets = [branches.then(|| step.target()), passes.then(|| step.next.into())];
            for offset in targets.into_iter().flatten().filter_map(|target| u32::try_from(target).ok()) {
                if self.places.get(offset as usize) != Some(&Place::NOTHING) {
                    continue;
                }
                let at = self.address.in_page(offset);
                let wanted = match with.known.wanted(offset) {
                    Some(wanted) => {
                        // Should that code just have been written, this region goes together with it.
                        self.granules |= granules(offset.into(), 1);
                        wanted
                    }
                    None => flags_wanted(cpu, at, with.forms, self.careful),
                };
                self.places[offset as usize] = Place::outside(wanted);
                self.outside.push(offset);
            }
        }
    }

    /// How far its direct branches go out of its page, in bytes.
    pub(super) fn reach(&self) -> u64 {
        let leads = self.leads.iter().filter_map(|&i| self.steps.get(usize::from(i)));
        leads.filter(|step| step.kind.is_direct()).map(|step| step.target().unsigned_abs()).max().unwrap_or(0)
    }

    /// Flags wanted before step `i`. With exact flags all are where a unit starts: the guest can be interrupted there.
    pub(super) fn wanted_before(&self, i: usize) -> Set {
        let step = &self.steps[i];
        if self.exact && step.unit != 0 { flags::ALL } else { step.effect.before(step.wanted) }
    }
}
