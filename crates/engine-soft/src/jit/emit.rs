//! From a decoded region to host code.
//!
//! Guest flags stay in the host's flags as long as nothing comes between. A check of an address needs the host's
//! flags, so before it they are stored where anybody still wants them, and loaded again only when an instruction looks at
//! them or keeps some of them. [`Emitter::host_flags`] and [`Emitter::stored_flags`] say where they are.
//!
//! Whatever a check does not cover runs out of line ([`Cold::Slow`]): the interpreter's handler executes the whole
//! instruction, with all its faults and side effects, and translated code goes on behind it.

use iced_x86::{Encoder, Instruction, InstructionInfoFactory};

use super::asm::{Assembler, Imm, RAX, Reg, Two, at};
use super::group::Group;
use super::helper::Mark;
use super::native::Kind;
use super::region::{Source, Step};
use super::registers::A;
use super::state::field;
use super::stubs::Stubs;
use crate::interp::op::Op;

/// A direct branch within a page that can be made to go straight to its target.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewLink {
    /// Where the branch's displacement is, in the region's code.
    pub(super) site: usize,
    /// Where it goes until it is linked.
    pub(super) stub: usize,
    /// Offset of the target in the page.
    pub(super) target: u32,
}

/// Code out of the way.
#[derive(Debug)]
pub(super) enum Cold {
    /// The instruction by its handler.
    Slow {
        /// Branches that lead here.
        sites: Vec<usize>,
        /// Which step.
        step: usize,
        /// Where to go on.
        back: usize,
        /// The host's flags are expected to be the guest's there.
        restore: bool,
    },
    /// The steps of a row, each with its own check.
    Apart {
        site: usize,
        steps: std::ops::Range<usize>,
        /// Where to go on.
        back: usize,
        /// Where the flags are before and behind: in the host's, in the vCPU.
        before: (bool, bool),
        behind: (bool, bool),
    },
    /// A conditional branch that is taken.
    Side {
        site: usize,
        /// Offset of the target from the page's start.
        target: i64,
        /// The host's flags must be stored.
        save: bool,
        /// Instructions of the region not executed.
        refund: u32,
    },
}

/// The state of translation.
pub(super) struct Emitter<'a> {
    pub(super) a: Assembler,
    pub(super) source: &'a Source,
    pub(super) stubs: &'a Stubs,
    pub(super) encoder: Encoder,
    pub(super) info: InstructionInfoFactory,
    /// Offset in the arena where the code will be.
    pub(super) base: usize,
    pub(super) cold: Vec<Cold>,
    pub(super) links: Vec<NewLink>,
    /// Index of the first of `links` in the cache.
    pub(super) first_link: usize,
    /// The host's flags are the guest's.
    pub(super) host_flags: bool,
    /// The flags in the vCPU are the guest's.
    pub(super) stored_flags: bool,
    /// The row under way: its addresses have been checked.
    pub(super) group: Option<Group>,
}

impl std::fmt::Debug for Emitter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Emitter").field("base", &self.base).finish_non_exhaustive()
    }
}

/// Host code for a region.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) code: Vec<u8>,
    pub(super) links: Vec<NewLink>,
    /// Instructions that the interpreter's handlers execute.
    pub(super) interpreted: usize,
}

/// Translates a region to code that will lie at `base` in the arena.
pub(super) fn emit(source: &Source, stubs: &Stubs, base: usize, first_link: usize) -> Output {
    let mut e = Emitter {
        a: Assembler::default(),
        source,
        stubs,
        encoder: Encoder::new(64),
        info: InstructionInfoFactory::new(),
        base,
        cold: Vec::new(),
        links: Vec::new(),
        first_link,
        host_flags: false,
        stored_flags: true,
        group: None,
    };
    let total = source.steps.len();
    e.a.imm_mem(Imm::Sub, field::budget(), total as i32);
    let out_of_budget = e.a.jcc(super::asm::cc::S);
    let mut interpreted = 0;
    let mut open = true;
    let mut i = 0;
    while i < total {
        if let Some(end) = e.try_row(i) {
            open = !closes(source.steps[end - 1].kind);
            i = end;
            continue;
        }
        let outcome = e.step(i);
        interpreted += usize::from(outcome.interpreted);
        open = outcome.open;
        i += 1;
    }
    if open {
        let next = source.steps[total - 1].next;
        e.exit_to(i64::from(next));
    }
    e.emit_cold();
    e.a.bind(out_of_budget);
    e.a.imm_mem(Imm::Add, field::budget(), total as i32);
    e.store_rip(source.address.page_offset() as i64);
    e.jump_out(stubs.budget);
    Output { code: e.a.code, links: e.links, interpreted }
}

/// Whether control never reaches the instruction behind, if this one is translated natively.
fn closes(kind: Kind) -> bool {
    matches!(kind, Kind::Jump | Kind::Call | Kind::JumpIndirect | Kind::CallIndirect | Kind::Return)
}

/// What became of a step.
struct Outcome {
    interpreted: bool,
    /// Control can reach the instruction behind.
    open: bool,
}

impl Emitter<'_> {
    pub(super) fn at(&self, i: usize) -> (&Step, &Op) {
        (&self.source.steps[i], &self.source.ops[i])
    }

    fn step(&mut self, i: usize) -> Outcome {
        let kind = self.source.steps[i].kind;
        let before = (self.a.here(), self.cold.len(), self.host_flags, self.stored_flags);
        let native = self.native(i, kind);
        if native.is_some() {
            return Outcome { interpreted: false, open: !closes(kind) };
        }
        self.a.code.truncate(before.0);
        self.cold.truncate(before.1);
        (self.host_flags, self.stored_flags) = (before.2, before.3);
        self.interpreted(i);
        Outcome { interpreted: true, open: i + 1 < self.source.steps.len() }
    }

    /// Step `i` in host code; `None` if it has none.
    pub(super) fn native(&mut self, i: usize, kind: Kind) -> Option<()> {
        match kind {
            Kind::Same => self.same(i),
            Kind::Divide => self.divide(i, false),
            Kind::DivideSigned => self.divide(i, true),
            Kind::Address => self.load_address(i),
            Kind::Push => self.push(i),
            Kind::Pop => self.pop(i),
            Kind::Leave => self.leave(i),
            Kind::Nothing => Some(()),
            Kind::Jump => self.jump(i),
            Kind::Branch => self.branch(i),
            Kind::Call => self.call(i),
            Kind::JumpIndirect => self.jump_indirect(i),
            Kind::CallIndirect => self.call_indirect(i),
            Kind::Return => self.ret(i),
            Kind::Interpreted => None,
        }
    }

    /// The instruction by its handler, in line.
    fn interpreted(&mut self, i: usize) {
        self.save_flags();
        self.call_handler(i);
        self.host_flags = false;
        if self.is_last(i) {
            self.follow_rip();
        }
    }

    pub(super) fn is_last(&self, i: usize) -> bool {
        i + 1 == self.source.steps.len()
    }

    /// Instructions of the region behind step `i`.
    pub(super) fn behind(&self, i: usize) -> u32 {
        (self.source.steps.len() - 1 - i) as u32
    }

    fn call_handler(&mut self, i: usize) {
        let mark = Mark { next: self.source.steps[i].next, behind: self.behind(i), ends: self.ends(i) };
        self.a.constant(A, (&raw const self.source.ops[i]) as u64);
        self.a.constant(super::registers::B, mark.pack());
        let site = self.a.call();
        self.a.patch(site, self.stubs.interpret as i64 - self.base as i64);
    }

    /// Whether nothing of the region can follow step `i` after its handler.
    fn ends(&self, i: usize) -> bool {
        self.is_last(i)
            && !matches!(
                self.source.steps[i].kind,
                Kind::Same | Kind::Divide | Kind::DivideSigned | Kind::Push | Kind::Pop | Kind::Leave
            )
    }

    /// Goes where a handler has put RIP.
    fn follow_rip(&mut self) {
        self.a.rm(Two::Load, A, field::rip());
        self.jump_out(self.stubs.dispatch);
    }

    /// Jumps to fixed code.
    pub(super) fn jump_out(&mut self, target: usize) {
        let site = self.a.jmp();
        self.a.patch(site, target as i64 - self.base as i64);
    }

    /// Encodes an instruction of the guest with its operands replaced.
    pub(super) fn encode(&mut self, instruction: &Instruction) -> Option<()> {
        self.encoder.set_buffer(std::mem::take(&mut self.a.code));
        let done = self.encoder.encode(instruction, 0);
        self.a.code = self.encoder.take_buffer();
        done.ok().map(drop)
    }

    /// Stores the host's flags in the vCPU if they are not there. Uses [`A`].
    pub(super) fn save_flags(&mut self) {
        self.save_flags_with(A);
    }

    /// Likewise; RAX spends the time in `scratch`.
    pub(super) fn save_flags_with(&mut self, scratch: Reg) {
        if !self.stored_flags {
            self.a.copy(scratch, RAX);
            self.a.bytes(&[0x9f]); // lahf
            self.a.bytes(&[0x0f, 0x90, 0xc0]); // seto al
            self.a.store_ax(field::status());
            self.a.copy(RAX, scratch);
            self.stored_flags = true;
        }
    }

    /// Loads the flags in the vCPU into the host's if they are not there. Uses `scratch`.
    pub(super) fn restore_flags(&mut self, scratch: Reg) {
        if !self.host_flags {
            load_flags(&mut self.a, scratch);
            self.host_flags = true;
        }
    }

    /// `rip = page + offset`, by way of [`A`].
    fn store_rip(&mut self, offset: i64) {
        self.linear(offset);
        self.a.rm(Two::Store, A, field::rip());
    }

    /// The linear address at `offset` from the page's start to [`A`].
    pub(super) fn linear(&mut self, offset: i64) {
        self.a.rm(Two::Load, A, field::page());
        match i32::try_from(offset) {
            Ok(0) => {}
            Ok(offset) => self.a.rm(Two::Lea, A, at(A, offset)),
            Err(_) => {
                let b = super::registers::B;
                self.a.constant(b, offset as u64);
                self.a.rm(Two::Lea, A, super::asm::Mem { base: Some(A), index: Some((b, 0)), disp: 0 });
            }
        }
    }

    /// Leaves the region for an address `target` from the page's start; flags are stored first.
    pub(super) fn exit_to(&mut self, target: i64) {
        self.save_flags();
        match u32::try_from(target) {
            Ok(target) if target < 0x1000 => {
                let site = self.a.jmp();
                self.link(site, target);
            }
            _ => {
                self.linear(target);
                self.jump_out(self.stubs.dispatch);
            }
        }
    }

    /// Emits what the branch at `site` does until it is linked.
    fn link(&mut self, site: usize, target: u32) {
        self.a.bind(site);
        let stub = self.a.here();
        self.a.store_imm32(field::link(), (self.first_link + self.links.len()) as u32);
        self.links.push(NewLink { site, stub, target });
        self.store_rip(i64::from(target));
        self.jump_out(self.stubs.link);
    }

    fn emit_cold(&mut self) {
        while let Some(cold) = self.cold.pop() {
            match cold {
                Cold::Apart { site, steps, back, before, behind } => {
                    self.a.bind(site);
                    (self.host_flags, self.stored_flags) = before;
                    let mut open = true;
                    for i in steps {
                        open = self.step(i).open;
                    }
                    if !open {
                        continue;
                    }
                    if behind.1 {
                        self.save_flags();
                    }
                    if behind.0 {
                        self.restore_flags(A);
                    }
                    let site = self.a.jmp();
                    self.a.patch(site, back as i64);
                }
                Cold::Slow { sites, step, back, restore } => {
                    for site in sites {
                        self.a.bind(site);
                    }
                    self.call_handler(step);
                    if self.ends(step) {
                        self.follow_rip();
                        continue;
                    }
                    if restore {
                        load_flags(&mut self.a, A);
                    }
                    let site = self.a.jmp();
                    self.a.patch(site, back as i64);
                }
                Cold::Side { site, target, save, refund } => {
                    self.a.bind(site);
                    self.stored_flags = !save;
                    self.save_flags();
                    if refund != 0 {
                        self.a.imm_mem(Imm::Add, field::budget(), refund as i32);
                    }
                    self.exit_to(target);
                }
            }
        }
    }
}

/// The guest's flags from the vCPU to the host's; RAX spends the time in `scratch`.
fn load_flags(a: &mut Assembler, scratch: Reg) {
    a.copy(scratch, RAX);
    a.load_ax(field::status());
    a.bytes(&[0x04, 0x7f]); // add al, 0x7f: sets OF if AL was 1
    a.bytes(&[0x9e]); // sahf
    a.copy(RAX, scratch);
}
