//! Operands: addresses, checks, and guest registers that live in memory.

use iced_x86::{Code, EncodingKind, Instruction, Register};

use super::asm::{Imm, Mem, RSI, Reg, Two, at, cc};
use super::emit::Emitter;
use super::helper::{Site, marks};
use super::laps::Laps;
use super::registers::{A, B, C, Home, home, sized};
use super::rewrite::{Registers, rewrite};
use super::state::field;
use super::step::Step;
use super::stubs::{data_entry, load_table};
use crate::interp::op::{Op, RIP, ZERO};

pub(super) const FS: u8 = 4;
pub(super) const GS: u8 = 5;
pub(super) const CS: u8 = 1;

/// A guest register without a host register that an instruction names: where it is meanwhile, and what is done with it.
#[derive(Clone, Copy)]
struct Placed {
    number: u8,
    reg: Reg,
    read: bool,
    write: bool,
}

/// What an effective address is the sum of.
#[derive(Clone, Copy, Debug)]
struct Parts {
    base: Option<Reg>,
    index: Option<(Reg, u8)>,
    disp: i64,
}

/// Whether the operand in memory is in FS or GS, the segments whose bases count.
pub(super) fn adds_base(op: &Op) -> bool {
    matches!(op.segment, FS | GS)
}

impl Emitter<'_> {
    /// The memory operand's effective address (without its segment's base) to `to`, by LEA, 32 or 64 bits wide. Uses [`A`]
    /// and [`B`]; changes no flag.
    pub(super) fn effective_address(&mut self, to: Reg, op: &Op, next: u32, cut: bool) -> Option<()> {
        let parts = self.address_parts(op, next);
        self.put_address(to, parts, op.address_mask, cut)
    }

    /// What an effective address is the sum of: registers, brought to [`A`] and [`B`] if they are in the vCPU, and a distance.
    fn address_parts(&mut self, op: &Op, next: u32) -> Parts {
        let mut disp = op.displacement;
        let base = match usize::from(op.base) {
            ZERO => None,
            RIP => {
                disp += i64::from(next);
                self.a.rm(Two::Load, A, field::page());
                Some(A)
            }
            _ => Some(self.fetch(op.base, A)),
        };
        let index = match usize::from(op.index) {
            ZERO => None,
            _ => Some((self.fetch(op.index, B), op.scale)),
        };
        Parts { base, index, disp }
    }

    /// That sum to `to`.
    fn put_address(&mut self, to: Reg, parts: Parts, mask: u64, cut: bool) -> Option<()> {
        let Parts { base, index, disp } = parts;
        let wide = match mask {
            u64::MAX => !cut,
            0xffff_ffff => false,
            _ => return None,
        };
        if base.is_none() && index.is_none() {
            self.a.constant(to, if wide { disp as u64 } else { disp as u32 as u64 });
            return Some(());
        }
        let disp = if wide { i32::try_from(disp).ok()? } else { disp as i32 };
        match (base, index, disp) {
            (Some(base), None, 0) if wide => self.a.copy(to, base),
            _ if wide => self.a.rm(Two::Lea, to, Mem { base, index, disp }),
            _ => self.a.rm32(Two::Lea, to, Mem { base, index, disp }),
        }
        Some(())
    }

    /// The host register that holds guest register `number`: its own, or `scratch` loaded with it.
    pub(super) fn fetch(&mut self, number: u8, scratch: Reg) -> Reg {
        match home(number) {
            Home::Host(reg) => reg,
            // If there was none, what is being emitted is taken back.
            Home::Slot if self.keeps() => self.kept(number, true, false).unwrap_or(scratch),
            Home::Slot => {
                self.a.rm(Two::Load, scratch, field::register(number));
                scratch
            }
        }
    }

    /// The memory operand's linear address to [`A`]. Uses [`B`]; changes flags.
    pub(super) fn address(&mut self, i: usize) -> Option<()> {
        let (step, op) = self.at(i);
        let (next, op) = (step.next, *op);
        let (size, write) = (step.facts.size, step.facts.stores);
        self.effective_address(A, &op, next, false)?;
        match op.segment {
            FS | GS if self.is_narrow() => self.add_base(&op, size, write),
            FS | GS => self.a.rm(Two::Add, A, field::segment_base(op.segment)),
            // It may be readable, and is never written.
            CS => return None,
            _ => {}
        }
        Some(())
    }

    /// Adds the base of FS or GS to the effective address in [`A`], in 32-bit code, unless the segment does not permit an access of `size`
    /// bytes: then the branches of [`Self::segment_misses`] are taken. Changes flags.
    fn add_base(&mut self, op: &Op, size: u16, write: bool) {
        self.a.test_byte(field::spans(op.segment), if write { 2 } else { 1 });
        self.segment_misses[0] = Some(self.a.jcc(cc::E));
        // Its last byte must not lie beyond the segment, which ends at 4 GiB.
        let known = usize::from(op.base) == ZERO && usize::from(op.index) == ZERO;
        let last = -i64::from(size);
        if size > 1 && !(known && op.displacement as u32 <= last as u32) {
            self.a.imm(Imm::Cmp, false, A, last as i32);
            self.segment_misses[1] = Some(self.a.jcc(cc::A));
        }
        self.a.rm32(Two::Add, A, field::segment_base(op.segment));
    }

    /// Turns the linear address in [`A`] into the host's if the soft TLB permits an access of `size` bytes and the address is
    /// a multiple of `alignment`, 1 or `size`; otherwise the branch returned is taken, and [`A`] is of no use any more. Uses
    /// [`B`]; changes flags.
    pub(super) fn check(&mut self, size: usize, alignment: u8, write: bool) -> usize {
        self.host_flags = false;
        let [tag, host] = data_entry(&mut self.a, write);
        // The distance from the entry's page, which is an offset in it if that is the address's.
        self.a.rm(Two::Sub, A, tag);
        let miss = if alignment > 1 {
            // An aligned access cannot leave its page.
            self.a.test_imm(A, !(0x1000 - i32::from(alignment)));
            self.a.jcc(cc::NE)
        } else {
            self.a.compare_imm(A, 0x1000 - size as i32);
            self.a.jcc(cc::A)
        };
        self.a.rm(Two::Add, A, host);
        miss
    }

    /// Flags that are wanted before or behind step `i` are in the vCPU after this.
    pub(super) fn keep_flags(&mut self, i: usize) {
        let (step, _) = self.at(i);
        if step.effect.before(step.wanted) != 0 {
            self.save_flags();
        }
    }

    /// The way out of line for step `i`, for branches in `sites`, coming back here.
    pub(super) fn slow(&mut self, i: usize, sites: impl IntoIterator<Item = usize>) {
        let segment = std::mem::take(&mut self.segment_misses);
        let mut sites = sites.into_iter().chain(segment.into_iter().flatten()).peekable();
        if sites.peek().is_some() {
            let id = self.site_back(i, |_| ());
            self.lead_to_fixed(sites, self.stubs.misses.slow, A, id);
        }
    }

    /// The number of a record of step `i` whose handler comes back here, completed by `more`.
    pub(super) fn site_back(&mut self, i: usize, more: impl FnOnce(&mut Site)) -> u64 {
        let (back, level) = (self.a.here() as u32, self.units.level.map_or(0, |level| level as u8));
        let mut site = Site { back, level, ..self.site_of(i) };
        if self.units.x87 {
            site.marks |= marks::X87;
        }
        more(&mut site);
        self.add_site(site)
    }

    /// The host's flags are what step `i` made of the guest's.
    pub(super) fn flags_changed(&mut self, i: usize) {
        if self.at(i).0.effect.changes != 0 {
            self.host_flags = true;
            self.stored_flags = false;
        }
    }

    /// MOV of 32 or 64 bits from or to a register without a host register.
    fn move_slot(&mut self, i: usize) -> Option<()> {
        let (step, op) = self.at(i);
        let wide = match op.code {
            _ if step.slots == 0 || step.facts.memory.is_some() => return None,
            Code::Mov_r64_rm64 | Code::Mov_rm64_r64 => true,
            Code::Mov_r32_rm32 | Code::Mov_rm32_r32 => false,
            _ => return None,
        };
        let (to, from) = (step.register(0), step.register(1));
        if self.keeps() {
            let from = self.fetch(from, B);
            let to = match home(to) {
                Home::Host(reg) => reg,
                Home::Slot => self.kept(to, false, true)?,
            };
            if wide {
                self.a.copy(to, from)
            } else {
                self.a.rr32(Two::Load, to, from)
            }
            return Some(());
        }
        let reg = match (home(from), home(to)) {
            (Home::Slot, home) => {
                let reg = if let Home::Host(reg) = home { reg } else { B };
                let from = field::register(from);
                if wide {
                    self.a.rm(Two::Load, reg, from)
                } else {
                    self.a.rm32(Two::Load, reg, from)
                }
                reg
            }
            (Home::Host(reg), _) if wide => reg,
            (Home::Host(reg), _) => {
                self.a.rr32(Two::Load, B, reg);
                B
            }
        };
        if home(to) == Home::Slot {
            self.a.rm(Two::Store, reg, field::register(to));
        }
        Some(())
    }

    /// The same instruction.
    pub(super) fn same(&mut self, i: usize) -> Option<()> {
        if self.move_slot(i).is_some() {
            return Some(());
        }
        self.place(i, self.at(i).0.alignment())
    }

    /// The flags are in the host's if an instruction without an operand in memory needs them there.
    #[inline(always)]
    fn bring_flags(&mut self, step: &Step) {
        if step.effect.needs_flags(step.wanted) {
            self.restore_flags_along(if self.keeps_address() { B } else { A });
        }
    }

    /// An instruction whose bytes stay what they are.
    #[inline(always)]
    pub(super) fn put_as_it_is(&mut self, step: &Step) {
        self.bring_flags(step);
        self.put_bytes(step);
    }

    /// Its bytes, the flags being where it needs them.
    #[inline(always)]
    fn put_bytes(&mut self, step: &Step) {
        self.a.put(u128::from_le_bytes(step.bytes), step.length.into());
        if step.effect.changes != 0 {
            self.host_flags = true;
            self.stored_flags = false;
        }
    }

    /// The same instruction, its operands put in place. `alignment` is what the operand in memory must have.
    pub(super) fn place(&mut self, i: usize, alignment: u8) -> Option<()> {
        let (step, _) = self.at(i);
        let (effect, wanted, facts) = (step.effect, step.wanted, &step.facts);
        if step.stays {
            self.bring_flags(step);
            self.note_point(i)?;
            self.put_bytes(step);
            return Some(());
        }
        let (memory, size) = (facts.memory.is_some(), facts.size.into());
        let (mut miss, mut check) = (None, None);
        let mut operand = at(A, 0);
        if let (true, Some(known)) = (memory, self.operand) {
            operand = known;
        } else if let (true, Some(group)) = (memory, self.group) {
            operand.disp = group.offset(self.at(i).1.displacement);
        } else if let (true, Some(distance)) = (memory, self.on_stack(i, alignment)) {
            self.keep_flags(i);
            check = Some(self.check_stack(distance, facts.size.into()));
        } else if memory {
            self.keep_flags(i);
            self.address(i)?;
            miss = Some(self.check(size, alignment, facts.stores));
        }
        let mut free: &[Reg] = if memory || self.keeps_address() { &[B, C] } else { &[A, B, C] };
        if effect.needs_flags(wanted) {
            self.restore_flags_along(free[0]);
        }
        let mut placed = [Placed { number: 0, reg: A, read: false, write: false }; 3];
        let mut count = 0;
        let mut registers = Registers::default();
        let mut plain = true;
        let keeps = self.keeps();
        if keeps && step.slots != 0 {
            self.find_kept(i, &mut registers)?;
        }
        for n in facts.general() {
            let number = self.at(i).0.register(n);
            // AH to BH.
            if number >= 16 {
                plain = false;
                continue;
            }
            let reg = match home(number) {
                Home::Host(reg) => reg,
                Home::Slot if keeps => continue,
                Home::Slot => {
                    let (read, write) = (!facts.replaces(n), facts.writes(n));
                    if let Some(known) = placed[..count].iter_mut().find(|p| p.number == number) {
                        (known.read, known.write) = (known.read | read, known.write | write);
                        known.reg
                    } else {
                        let (&reg, rest) = free.split_first()?;
                        free = rest;
                        placed[count] = Placed { number, reg, read, write };
                        count += 1;
                        reg
                    }
                }
            };
            registers.set(n, reg);
        }
        for &Placed { number, reg, .. } in placed[..count].iter().filter(|p| p.read) {
            self.a.rm(Two::Load, reg, field::register(number));
        }
        self.note_point(i)?;
        self.copy_placed(i, &registers, memory.then_some(operand), plain)?;
        for &Placed { number, reg, .. } in placed[..count].iter().filter(|p| p.write) {
            self.a.rm(Two::Store, reg, field::register(number));
        }
        if placed[..count].iter().any(|p| p.reg == C) {
            load_table(&mut self.a);
        }
        self.flags_changed(i);
        self.slow_unless_covered(i, check);
        if miss.is_some() {
            self.slow(i, miss);
        }
        Some(())
    }

    /// Puts registers that are kept in the place of operands: those first that are read, since a register may be read by one operand and
    /// written by another.
    fn find_kept(&mut self, i: usize, registers: &mut Registers) -> Option<()> {
        let step = &self.source.steps[i];
        for reads in [true, false] {
            for n in step.facts.general().filter(|&n| step.facts.replaces(n) != reads) {
                let number = step.register(n);
                if number < 16 && home(number) == Home::Slot {
                    registers.set(n, self.kept(number, reads, step.facts.writes(n))?);
                }
            }
        }
        Some(())
    }

    /// Loads the flags as [`Self::restore_flags`], also where registers are kept.
    fn restore_flags_along(&mut self, usual: Reg) {
        if !self.host_flags {
            let scratch = self.scratch(usual);
            self.restore_flags(scratch);
            self.release();
        }
    }

    /// The instruction of step `i` with registers and its memory operand put in place. `plain`: it names none of AH to BH.
    fn copy_placed(
        &mut self,
        i: usize,
        registers: &Registers,
        memory: Option<Mem>,
        plain: bool,
    ) -> Option<()> {
        let step = &self.source.steps[i];
        if let Some(roles) = &step.facts.roles
            && plain
            && step.same
            && let Some((bytes, length)) = rewrite(&step.bytes, step.length.into(), roles, registers, memory)
        {
            self.a.put(bytes, length);
            return Some(());
        }
        let mut instruction = self.source.instruction(i);
        for (n, reg) in registers.iter() {
            instruction.set_op_register(n, sized(reg, instruction.op_register(n).size()));
        }
        let Some(memory) = memory else { return self.encode(&instruction) };
        place_memory(&mut instruction, memory);
        if plain {
            return self.encode(&instruction);
        }
        if memory.base != Some(A) || memory.index.is_some() {
            return None;
        }
        // AH to BH cannot be named beside one of the upper registers: the address changes places with one that such an instruction does
        // not name.
        instruction.set_memory_base(sized(RSI, 8));
        self.a.exchange(A, RSI);
        self.encode(&instruction)?;
        self.a.exchange(A, RSI);
        Some(())
    }

    /// Whether [`A`] is to stay as it is between steps.
    pub(super) fn keeps_address(&self) -> bool {
        self.group.is_some() || self.laps != Laps::None
    }

    /// The displacement of a memory operand that is one from the stack pointer alone.
    pub(super) fn on_stack(&self, i: usize, alignment: u8) -> Option<i32> {
        let op = self.at(i).1;
        let simple = op.base == 4 && usize::from(op.index) == ZERO && self.is_plain(op) && alignment == 1;
        if simple { i32::try_from(op.displacement).ok() } else { None }
    }

    /// LEA.
    pub(super) fn load_address(&mut self, i: usize) -> Option<()> {
        let (step, op) = self.at(i);
        let (next, op) = (step.next, *op);
        let size = match op.code {
            Code::Lea_r64_m => 8,
            Code::Lea_r32_m => 4,
            _ => return None,
        };
        let to = home(op.dst);
        let parts = self.address_parts(&op, next);
        let reg = match to {
            Home::Host(reg) => reg,
            // LEA has read them when it writes.
            Home::Slot if self.keeps() => {
                self.release();
                self.kept(op.dst, false, true)?
            }
            Home::Slot => A,
        };
        self.put_address(reg, parts, op.address_mask, size == 4)?;
        if to == Home::Slot && !self.keeps() {
            self.a.rm(Two::Store, reg, field::register(op.dst));
        }
        Some(())
    }
}

/// Makes the memory operand that one, which has a base.
pub(super) fn place_memory(instruction: &mut Instruction, memory: Mem) {
    let Mem { base, index, disp } = memory;
    let register = |reg: Option<Reg>| reg.map_or(Register::None, |reg| sized(reg, 8));
    instruction.set_memory_base(register(base));
    instruction.set_memory_index(register(index.map(|(reg, _)| reg)));
    instruction.set_memory_index_scale(1 << index.map_or(0, |(_, shift)| shift));
    instruction.set_memory_displacement64(disp as i64 as u64);
    // EVEX counts the short ones in operands.
    let short = instruction.encoding() != EncodingKind::EVEX;
    instruction.set_memory_displ_size(match disp {
        0 => 0,
        -128..128 if short => 1,
        _ => 8,
    });
    instruction.set_segment_prefix(Register::None);
}
