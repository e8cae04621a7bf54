//! How translated code goes from place to place: direct branches, calls and returns.

use iced_x86::Code;

use super::asm::{Imm, Mem, RSP, Reg, Two, at, cc};
use super::cold::Side;
use super::emit::Emitter;
use super::laps::Laps;
use super::registers::{A, B, C, STACK};
use super::state::field;
use super::stubs::{Target, enter_page, fetch_entry, load_table};
use crate::interp::op::{Op, prefix};
use crate::vector::pass::Units;
use ringfence_memory::GuestAddress;

/// A direct branch that can be made to go straight to its target's code. Offsets are those in the region's code.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewLink {
    /// Where the branch's displacement is.
    pub(super) site: usize,
    /// Where it goes until it is linked.
    pub(super) stub: usize,
    /// The target's distance from the page's start.
    pub(super) target: i64,
    /// It leads to another page.
    pub(super) crossing: Option<NewCrossing>,
}

/// The check before a link to another page.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewCrossing {
    /// That of its [`Crossing`].
    pub(super) number: u32,
    /// The branches taken where it fails.
    misses: [usize; 2],
    /// Where the number is that it compares with.
    pub(super) checked: usize,
    /// Where to go on with it once it is verified.
    verified: usize,
    /// Of a call, where it comes back.
    back: Option<usize>,
}

/// Of a link to another page, what its check and the fixed code behind it look at. The target's code is known by its physical page, so
/// a branch must not go there unless its linear page still is that one. That was made sure of once, from one linear page, under the number
/// that [`crate::mmu::tlb::Tlb::generation`] names all such translations by, and holds from that page as long as the number is the same.
/// The check compares both: code that is at two addresses of an address space may have other neighbours at each. Elsewhere or under
/// another number the fixed code asks the soft TLB, and has the check learn the new ones in time.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(super) struct Crossing {
    /// The target's distance from the start of the link's page.
    pub(super) target: i64,
    /// Bits 8 to 39 of the address of the physical page that the target's code was made from, or [`Crossing::NO_PAGE`].
    pub(super) page: u32,
    /// The link.
    pub(super) link: u32,
    /// Where the number that the check compares with is in the arena; the linear page is [`Crossing::FROM`] behind it.
    pub(super) checked: u32,
    /// The number under which it was verified last.
    pub(super) seen: u32,
    /// How often it has yet to be verified under that before the check learns it.
    pub(super) patience: u32,
}

impl Crossing {
    /// It leads nowhere: a physical page's address has zeros below bit 12.
    pub(super) const NO_PAGE: u32 = u32::MAX;
    /// Four bytes, JNE, and what comes before the constant of MOV.
    pub(super) const FROM: i32 = 4 + 6 + 2;

    /// One that leads nowhere yet.
    pub(super) fn new(target: i64, link: u32, checked: usize) -> Self {
        Self { target, page: Self::NO_PAGE, link, checked: checked as u32, seen: 0, patience: 0 }
    }
}

impl NewLink {
    /// Changes offsets in the region's code to offsets in the arena.
    pub(super) fn put(&mut self, place: impl Fn(usize) -> usize) {
        self.site = place(self.site);
        self.stub = place(self.stub);
        if let Some(crossing) = &mut self.crossing {
            crossing.checked = place(crossing.checked);
        }
    }
}

impl Emitter<'_> {
    /// Goes on behind step `i`, the last of its run, wherever that is.
    pub(super) fn go_on(&mut self, i: usize) {
        match self.source.following(i) {
            Some(next) => {
                if self.source.wanted_before(next) != 0 {
                    self.save_flags();
                }
                let site = self.a.jmp();
                self.lead_to_label(site, next);
            }
            None => self.exit_to(i64::from(self.source.steps[i].next)),
        }
    }

    /// Leaves the region for an address `target` from the page's start; flags are stored first if they are wanted there.
    pub(super) fn exit_to(&mut self, target: i64) {
        if self.source.wanted_at(target) != 0 {
            self.save_flags();
        }
        match page_offset(target) {
            Some(target) => {
                let site = self.a.jmp();
                self.link(site, target);
            }
            None => self.go_to_other_page(target),
        }
    }

    /// Goes to another page. Flags are stored, if they are wanted there.
    pub(super) fn go_to_other_page(&mut self, target: i64) {
        let Ok(page) = i32::try_from(target & !0xfff) else {
            self.linear(target);
            return self.jump_out(self.stubs.dispatch);
        };
        let crossing = self.enter_other_page(page);
        let site = self.a.jmp();
        self.links.push(NewLink { site, stub: 0, target, crossing: Some(crossing) });
    }

    /// Makes the page at a distance from this one the one whose code runs, if it is known to be the physical page that the next link
    /// expects; otherwise a branch is taken.
    fn enter_other_page(&mut self, page: i32) -> NewCrossing {
        let number = (self.first_crossing + self.crossings) as u32;
        self.crossings += 1;
        self.a.compare_imm32(field::code_generation(), 0);
        let checked = self.a.here() - 4;
        let other_number = self.a.jcc(cc::NE);
        self.a.wide_constant(A, 0);
        debug_assert_eq!(self.a.here(), checked + Crossing::FROM as usize + 8);
        self.a.rm(Two::Cmp, A, field::page());
        let misses = [other_number, self.a.jcc(cc::NE)];
        let verified = self.a.here();
        if self.is_narrow() {
            self.a.imm_mem32(Imm::Add, field::page(), page);
        } else {
            self.a.imm_mem(Imm::Add, field::page(), page);
        }
        NewCrossing { number, misses, checked, verified, back: None }
    }

    /// Makes sure that the next page is the physical one in which the region's only instruction ends.
    pub(super) fn check_second_page(&mut self, second: GuestAddress) {
        self.linear(0x1000);
        fetch_entry(&mut self.a);
        self.a.rm(Two::Cmp, A, at(B, 0));
        let unknown = self.a.jcc(cc::NE);
        self.a.compare_imm32(at(B, 9), (second.0 >> 8) as u32);
        let other = self.a.jcc(cc::NE);
        let offset = self.source.address.page_offset();
        self.lead_to_fixed([unknown, other], self.stubs.by_interpreter, A, offset);
    }

    /// Makes the branch at `site` a link to an offset in the page.
    fn link(&mut self, site: usize, target: u32) {
        self.links.push(NewLink { site, stub: 0, target: target.into(), crossing: None });
    }

    /// The way of a link that leads nowhere yet, and of one to a page that must be looked at.
    pub(super) fn unlinked(&mut self, index: usize) {
        let link = self.links[index];
        let Some(crossing) = link.crossing else {
            self.a.bind(link.site);
            self.links[index].stub = self.a.here();
            self.a.constant(A, (self.first_link + index) as u64);
            return self.jump_out(self.stubs.link);
        };
        for miss in crossing.misses {
            self.a.bind(miss);
        }
        self.a.constant(A, crossing.number.into());
        let crossing_code = self.stubs.misses.crossings[usize::from(self.is_narrow())];
        self.call_out(crossing_code.verify);
        self.a.jcc_to(cc::E, crossing.verified as i64);
        if let Some(back) = crossing.back {
            // What comes next is called, and comes back to where the call in line would.
            let site = self.a.call();
            self.a.jmp_to(back as i64);
            self.a.bind(site);
        }
        self.jump_out(crossing_code.astray);
    }

    pub(super) fn jump(&mut self, i: usize) -> Option<()> {
        let target = self.at(i).0.target();
        match self.source.inside(target) {
            Some(step) => {
                if self.source.wanted_before(step) != 0 {
                    self.save_flags();
                }
                let site = self.a.jmp();
                self.lead_to_label(site, step);
            }
            None => self.exit_to(target),
        }
        Some(())
    }

    pub(super) fn branch(&mut self, i: usize) -> Option<()> {
        let (step, _) = self.at(i);
        let (target, refund) = (step.target(), step.behind);
        let inside = self.source.inside(target);
        let wanted = self.source.wanted_at(target) != 0;
        let site = self.jump_if(i);
        let save = wanted && !self.stored_flags;
        let table = self.laps == Laps::WithoutTable;
        match (inside, page_offset(target)) {
            _ if table => self.sides.push(Side { site, target, inside, save, refund, table }),
            (Some(to), _) if refund == 0 && self.begin_loop(site, to, i) => {}
            (Some(to), _) if refund == 0 => self.lead_to_label(site, to),
            (None, Some(target)) if refund == 0 && !save => self.link(site, target),
            _ => self.sides.push(Side { site, target, inside, save, refund, table }),
        }
        Some(())
    }

    /// Jumps if the conditional branch of step `i` is taken; flags are stored first that its target in the region wants.
    pub(super) fn jump_if(&mut self, i: usize) -> usize {
        let (step, op) = self.at(i);
        let target = step.target();
        if reads_flags(op.code) {
            self.restore_flags(A);
        }
        if self.source.inside(target).is_some() && self.source.wanted_at(target) != 0 {
            // The host's flags stay as they are.
            self.save_flags();
        }
        self.jump_if_taken(op)
    }

    /// The jump alone. The flags that it reads are in the host's; changes none.
    fn jump_if_taken(&mut self, op: &Op) -> usize {
        use Code as C;
        // LEA leaves the flags alone.
        match op.code {
            C::Loop_rel8_64_RCX | C::Loope_rel8_64_RCX | C::Loopne_rel8_64_RCX => {
                self.a.rm(Two::Lea, RCX, at(RCX, -1));
            }
            C::Loop_rel8_64_ECX
            | C::Loope_rel8_64_ECX
            | C::Loopne_rel8_64_ECX
            | C::Loop_rel8_32_ECX
            | C::Loope_rel8_32_ECX
            | C::Loopne_rel8_32_ECX => {
                self.a.rm32(Two::Lea, RCX, at(RCX, -1));
            }
            _ => {}
        }
        // What comes before a JMP, which has five bytes, and whether a count of zero leads to that or behind it.
        let (before, zero): (&[u8], _) = match op.code {
            C::Loop_rel8_64_RCX | C::Loop_rel8_64_ECX | C::Loop_rel8_32_ECX => (&[], false),
            C::Loope_rel8_64_RCX | C::Loope_rel8_64_ECX | C::Loope_rel8_32_ECX => (&[0x75, 5], false), // jne
            C::Loopne_rel8_64_RCX | C::Loopne_rel8_64_ECX | C::Loopne_rel8_32_ECX => (&[0x74, 5], false), // je
            C::Jrcxz_rel8_64 | C::Jecxz_rel8_64 | C::Jecxz_rel8_32 => (&[0xeb, 5], true),
            _ => return self.a.jcc(op.condition),
        };
        let in_rcx = matches!(
            op.code,
            C::Loop_rel8_64_RCX | C::Loope_rel8_64_RCX | C::Loopne_rel8_64_RCX | C::Jrcxz_rel8_64
        );
        if !in_rcx {
            self.a.bytes(&[0x67]);
        }
        let over = before.len() as u8 + if zero { 0 } else { 5 };
        self.a.bytes(&[0xe3, over]); // jrcxz
        self.a.bytes(before);
        self.a.jmp()
    }

    /// Pushes the address behind step `i` to `slot`, and to the host's stack. Uses [`B`].
    fn push_return(&mut self, i: usize, slot: Mem) {
        let next = self.at(i).0.next as i32;
        self.a.rm(Two::Load, B, field::page());
        self.a.rm(Two::Lea, B, at(B, next));
        self.store_pointer(B, slot);
        self.settle_stack(-self.word());
        self.a.push(B);
    }

    /// Where the return from a call at step `i` comes back: takes the guest's return address, which is in [`A`] as well, off
    /// the host's stack. It may lie in the next page; the page is that of the call.
    fn come_back(&mut self, i: usize) {
        self.a.imm(Imm::Add, true, RSP, 8);
        let next = self.at(i).0.next as i32;
        self.a.rm(Two::Lea, A, at(A, -next));
        self.a.rm(Two::Store, A, field::page());
        (self.host_flags, self.stored_flags, self.units) = (false, true, Units::NONE);
    }

    pub(super) fn call(&mut self, i: usize) -> Option<()> {
        let target = self.at(i).0.target();
        let other_page = i32::try_from(target & !0xfff).ok()?;
        let (slot, check) = self.check_push(i);
        self.push_return(i, slot);
        self.save_flags();
        let crossing = page_offset(target).is_none().then(|| self.enter_other_page(other_page));
        let site = self.a.call();
        let crossing = crossing.map(|crossing| NewCrossing { back: Some(self.a.here()), ..crossing });
        self.links.push(NewLink { site, stub: 0, target, crossing });
        self.come_back(i);
        self.slow_unless_covered(i, check);
        Some(())
    }

    /// The target of an indirect branch, looked up: its address is in [`A`], its code's in [`B`]. Uses [`C`].
    fn indirect_target(&mut self, i: usize, sites: &mut Vec<usize>) -> Option<()> {
        let (_, op) = self.at(i);
        if op.has(prefix::MEMORY) {
            self.address(i)?;
            sites.push(self.check(self.word() as usize, 1, false));
            self.load_pointer(A, at(A, 0));
        } else {
            let number = op.dst;
            let from = self.fetch(number, A);
            self.copy_pointer(A, from);
        }
        let missing = Target::find(&mut self.a);
        let id = self.site_back(i, |_| ());
        self.lead_to_fixed(missing, self.stubs.misses.target, B, id);
        Some(())
    }

    pub(super) fn jump_indirect(&mut self, i: usize) -> Option<()> {
        self.save_flags();
        let mut sites = Vec::new();
        self.indirect_target(i, &mut sites)?;
        enter_page(&mut self.a);
        load_table(&mut self.a);
        self.a.jmp_reg(B);
        self.slow(i, sites);
        Some(())
    }

    pub(super) fn call_indirect(&mut self, i: usize) -> Option<()> {
        self.save_flags();
        let word = self.word();
        self.lea(A, at(STACK, -word));
        let mut sites = vec![self.check(word as usize, 1, true)];
        self.a.rm(Two::Store, A, field::slot());
        self.indirect_target(i, &mut sites)?;
        // Nothing can go wrong from here on.
        let next = self.at(i).0.next as i32;
        self.a.rm(Two::Load, C, field::page());
        self.a.rm(Two::Lea, C, at(C, next));
        enter_page(&mut self.a);
        self.a.rm(Two::Load, A, field::slot());
        self.store_pointer(C, at(A, 0));
        self.lea(STACK, at(STACK, -word));
        self.a.push(C);
        load_table(&mut self.a);
        self.a.call_reg(B);
        self.come_back(i);
        self.slow(i, sites);
        Some(())
    }

    pub(super) fn ret(&mut self, i: usize) -> Option<()> {
        let released = (self.at(i).1.immediate & 0xffff) as i32;
        // A row keeps its address in A.
        self.save_flags_with(B);
        let (slot, check) = self.check_pop(i);
        self.load_pointer(A, slot);
        self.settle_stack(self.word() + released);
        self.a.rm(Two::Cmp, A, at(RSP, 8));
        let site = self.a.jcc(cc::NE);
        self.a.ret();
        // It does not match the call on top.
        let id = self.site(i);
        self.lead_to_fixed([site], self.stubs.ret[usize::from(self.is_narrow())], B, id);
        self.slow_unless_covered(i, check);
        Some(())
    }
}

const RCX: Reg = Reg(1);

/// Whether a conditional branch looks at flags: not if only at a count.
fn reads_flags(code: Code) -> bool {
    use Code as C;
    let counts = [
        C::Loop_rel8_64_RCX,
        C::Loop_rel8_64_ECX,
        C::Loop_rel8_32_ECX,
        C::Jrcxz_rel8_64,
        C::Jecxz_rel8_64,
        C::Jecxz_rel8_32,
    ];
    !counts.contains(&code)
}

/// A target in the page.
fn page_offset(target: i64) -> Option<u32> {
    u32::try_from(target).ok().filter(|&target| target < 0x1000)
}
