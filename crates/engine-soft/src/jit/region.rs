//! What is translated at once: instructions of one page that lead to each other.
//!
//! From its first instruction a region follows the code past branches not taken, behind calls, and to targets of branches
//! that have been seen to be taken; not into code where another region starts. It is a list of *runs*, in each of which every instruction follows the one before. An
//! instruction that something else in the region leads to has a *label*.
//!
//! Instructions are taken off the budget by *units*: a unit is entered at its first instruction only.

use std::collections::VecDeque;

use iced_x86::Instruction;
use ringfence_memory::GuestAddress;

use super::Options;
use super::flags::{self, Effect, Set};
use super::native::{Host, Kind, kind};
use crate::code::granules;
use crate::interp::cpu::Cpu;
use crate::interp::decode::{decode_run, decode_straddling, peek, undefined};
use crate::interp::op::{Handler, Op, RIP};
use crate::vector::pass::Passed;

/// One instruction of a region.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) instruction: Instruction,
    pub(super) kind: Kind,
    pub(super) op: Op,
    /// Of a vector instruction executed as it is.
    pub(super) passed: Option<Passed>,
    pub(super) effect: Effect,
    /// Flags wanted behind it.
    pub(super) wanted: Set,
    /// Offset of the next instruction in the page; up to 0x1000 where the page ends, and beyond.
    pub(super) next: u32,
    /// It ends its run.
    pub(super) last: bool,
    /// Something other than the step before leads here.
    pub(super) label: bool,
    /// Instructions of the unit that starts here; 0 if none does.
    pub(super) unit: u16,
    /// Instructions of its unit behind it.
    pub(super) behind: u16,
}

impl Step {
    /// An instruction that ends at `next`.
    fn new(instruction: Option<Instruction>, op: Op, next: u32, host: &Host, options: &Options) -> Self {
        // Nothing is native that the interpreter does not know.
        let known = !std::ptr::fn_addr_eq(op.handler, undefined as Handler);
        let (kind, passed) =
            instruction.filter(|_| known).map_or((Kind::Interpreted, None), |i| kind(&i, host));
        let instruction = instruction.unwrap_or_default();
        let mut effect = match kind {
            // Whatever it is, it finds the flags in the vCPU and leaves them there.
            Kind::Interpreted => Effect { reads: flags::ALL, changes: flags::ALL, kills: flags::ALL },
            _ => flags::effect(&instruction),
        };
        if options.exact_flags && may_fault(&instruction, kind) {
            effect.reads = flags::ALL;
        }
        Self {
            instruction,
            kind,
            op,
            passed,
            effect,
            wanted: 0,
            next,
            last: false,
            label: false,
            unit: 0,
            behind: 0,
        }
    }

    /// Offset of the instruction in the page.
    pub(super) fn start(&self) -> u32 {
        self.next - u32::from(self.op.length)
    }

    /// Where a relative branch goes, from the page's start.
    pub(super) fn target(&self) -> i64 {
        i64::from(self.next).wrapping_add(self.op.immediate as i64)
    }
}

/// What is known of code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// Nothing: it may never be executed.
    No,
    /// It has been executed by the interpreter.
    Executed,
    /// There is a region that starts there.
    Translated,
}

/// A decoded region.
#[derive(Debug)]
pub(super) struct Source {
    /// Physical address of its first instruction.
    pub(super) address: GuestAddress,
    pub(super) steps: Vec<Step>,
    /// Where each step starts in the page: what [`Source::find`] searches, without going over whole steps.
    starts: Vec<u16>,
    /// The page in which its only instruction ends, if that is not the one in which it starts.
    pub(super) second: Option<GuestAddress>,
    /// Granules of the page that it was made from.
    pub(super) granules: u64,
    /// Bytes of guest code.
    pub(super) bytes: u32,
    /// Flags wanted where branches lead to out of the region, by offset in the page.
    outside: Vec<(u32, Set)>,
    exact: bool,
    /// See [`Source::decode`].
    straight: bool,
}

impl Source {
    /// Decodes the region that starts at `address`; `None` if its first instruction cannot be decoded within the page.
    /// `seen` tells what is known of the code at an offset in the page.
    ///
    /// A `straight` region is one run, in which no branch stays: it leads out wherever it goes.
    ///
    /// With exact flags, every flag counts as looked at wherever the guest could be interrupted: an exception's frame shows
    /// them all. Otherwise flags that the guest's code will overwrite unread may be stale in such a frame.
    pub(super) fn decode(
        cpu: &mut Cpu,
        address: GuestAddress,
        host: &Host,
        options: &Options,
        straight: bool,
        seen: impl Fn(u32) -> Seen,
    ) -> Option<Self> {
        let mut source = Self {
            address,
            steps: Vec::with_capacity(32),
            starts: Vec::with_capacity(32),
            second: None,
            granules: 0,
            bytes: 0,
            outside: Vec::new(),
            exact: options.exact_flags,
            straight,
        };
        let mut ahead = VecDeque::from([address.page_offset() as u32]);
        while let Some(offset) = ahead.pop_front() {
            let wanted =
                source.steps.is_empty() || source.find(offset).is_none() && seen(offset) != Seen::Translated;
            if wanted && source.steps.len() < options.region {
                source.decode_run(cpu, offset, host, options, &mut ahead, &seen);
            }
            if straight {
                break;
            }
        }
        if source.steps.is_empty() {
            source.decode_straddling(cpu, host, options)?;
        }
        source.put_labels();
        if !options.exact_flags {
            source.look_outside(cpu);
        }
        source.put_wanted();
        source.put_units();
        if options.exact_flags {
            source.put_wanted();
        }
        Some(source)
    }

    fn push(&mut self, step: Step) {
        // No instruction starts behind the page.
        self.starts.push(step.start() as u16);
        self.steps.push(step);
    }

    /// The step at an offset in the page.
    pub(super) fn find(&self, offset: u32) -> Option<usize> {
        let offset = u16::try_from(offset).ok()?;
        self.starts.iter().position(|&start| start == offset)
    }

    /// The step that a relative branch leads to, if it is in the region.
    pub(super) fn inside(&self, target: i64) -> Option<usize> {
        u32::try_from(target).ok().filter(|_| !self.straight).and_then(|offset| self.find(offset))
    }

    fn decode_run(
        &mut self,
        cpu: &mut Cpu,
        offset: u32,
        host: &Host,
        options: &Options,
        ahead: &mut VecDeque<u32>,
        seen: impl Fn(u32) -> Seen,
    ) {
        let start = GuestAddress(self.address.page().0 + u64::from(offset));
        let most = options.region - self.steps.len();
        let run = decode_run(cpu, start, most, |offset| {
            self.find(offset).is_some() || seen(offset) == Seen::Translated
        });
        let mut next = offset;
        for (instruction, op) in run {
            next += u32::from(op.length);
            let step = Step::new(instruction, op, next, host, options);
            let target = u32::try_from(step.target()).ok().filter(|&target| target < 0x1000);
            match (step.kind, target) {
                (Kind::Branch, Some(target)) if seen(target) == Seen::Executed => ahead.push_back(target),
                (Kind::Jump, Some(target)) => ahead.push_front(target),
                (Kind::Call | Kind::CallIndirect, _) if next < 0x1000 => ahead.push_front(next),
                _ => {}
            }
            self.push(step);
        }
        if next != offset {
            self.bytes += next - offset;
            self.granules |= granules(offset.into(), (next - offset).into());
            if let Some(step) = self.steps.last_mut() {
                step.last = true;
            }
        }
    }

    /// The one instruction of a region that ends in the next page.
    fn decode_straddling(&mut self, cpu: &mut Cpu, host: &Host, options: &Options) -> Option<()> {
        let linear = cpu.regs[RIP];
        let offset = self.address.page_offset();
        let (instruction, op, second) = decode_straddling(cpu, linear, self.address)?;
        let next = offset as u32 + u32::from(op.length);
        let mut step = Step::new(Some(instruction), op, next, host, options);
        step.last = true;
        self.push(step);
        self.second = Some(second.page());
        self.granules = granules(offset, 0x1000 - offset);
        self.bytes = u32::from(op.length);
        Some(())
    }

    /// The step that follows step `i` when it does not branch, if it is in the region.
    pub(super) fn following(&self, i: usize) -> Option<usize> {
        if self.steps[i].last { self.find(self.steps[i].next) } else { Some(i + 1) }
    }

    fn put_labels(&mut self) {
        for i in 0..self.steps.len() {
            let step = &self.steps[i];
            let branches = matches!(step.kind, Kind::Branch | Kind::Jump);
            let taken = branches.then(|| self.inside(step.target())).flatten();
            let next = (step.last && step.kind != Kind::Jump).then(|| self.find(step.next)).flatten();
            for at in [taken, next].into_iter().flatten() {
                self.steps[at].label = true;
            }
        }
    }

    fn put_units(&mut self) {
        let mut open = false;
        for i in 0..self.steps.len() {
            if !open || self.steps[i].label {
                self.steps[i].unit = 1;
            }
            let step = &self.steps[i];
            // Behind a branch within the region another unit starts, so that taking it needs no correction; not where that
            // would cost the flags.
            let branches = step.kind == Kind::Branch && self.inside(step.target()).is_some();
            let free = self.following(i).is_some_and(|next| self.wanted_before(next) == 0);
            open = !(step.last || branches && free);
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
            for i in (0..self.steps.len()).rev() {
                let step = &self.steps[i];
                let behind = || self.wanted_at(step.next.into());
                let wanted = match step.kind {
                    Kind::Jump => self.wanted_at(step.target()),
                    Kind::Branch => self.wanted_at(step.target()) | behind(),
                    Kind::Call | Kind::CallIndirect | Kind::JumpIndirect | Kind::Return => flags::ALL,
                    _ => behind(),
                };
                changed |= wanted != step.wanted;
                self.steps[i].wanted = wanted;
            }
        }
    }

    /// Flags wanted at an offset from the page's start.
    pub(super) fn wanted_at(&self, target: i64) -> Set {
        match (self.inside(target), u32::try_from(target)) {
            (Some(step), _) => self.wanted_before(step),
            (None, Ok(offset)) if !self.exact => {
                self.outside.iter().find(|(at, _)| *at == offset).map_or(flags::ALL, |&(_, wanted)| wanted)
            }
            _ => flags::ALL,
        }
    }

    /// Looks at the code in the page that branches lead to out of the region, for the flags that it wants.
    fn look_outside(&mut self, cpu: &mut Cpu) {
        for i in 0..self.steps.len() {
            let step = &self.steps[i];
            let branches = matches!(step.kind, Kind::Branch | Kind::Jump);
            let passes = step.last && !matches!(step.kind, Kind::Jump | Kind::JumpIndirect | Kind::Return);
            let targets = [branches.then(|| step.target()), passes.then(|| step.next.into())];
            for offset in targets.into_iter().flatten().filter_map(|target| u32::try_from(target).ok()) {
                let known = self.outside.iter().any(|(at, _)| *at == offset);
                if offset < 0x1000 && !known && self.find(offset).is_none() {
                    let at = GuestAddress(self.address.page().0 + u64::from(offset));
                    self.outside.push((offset, flags_wanted(cpu, at)));
                }
            }
        }
    }

    /// Flags wanted before step `i`. With exact flags all are where a unit starts: the guest can be interrupted there.
    pub(super) fn wanted_before(&self, i: usize) -> Set {
        let step = &self.steps[i];
        if self.exact && step.unit != 0 { flags::ALL } else { step.effect.before(step.wanted) }
    }
}

/// Instructions looked at for the flags that they want.
const LOOK: usize = 5;

/// Which flags the code at an address may look at. Whoever relies on it hears of a write to that code, because it is in the
/// same page.
fn flags_wanted(cpu: &mut Cpu, address: GuestAddress) -> Set {
    let mut left = flags::ALL;
    let mut read = 0;
    peek(cpu, address, LOOK, |instruction| {
        let effect = flags::effect(instruction);
        read |= effect.reads & left;
        left &= !effect.kills;
        // What else it is may be looked at elsewhere: only plain instructions go on.
        left != 0 && instruction.flow_control() == iced_x86::FlowControl::Next
    });
    read | left
}

fn may_fault(instruction: &Instruction, kind: Kind) -> bool {
    match kind {
        Kind::Same | Kind::Vector => {
            kind == Kind::Vector
                || (0..instruction.op_count()).any(|i| instruction.op_kind(i) == iced_x86::OpKind::Memory)
        }
        Kind::Address | Kind::Nothing | Kind::Jump | Kind::Branch => false,
        _ => true,
    }
}
