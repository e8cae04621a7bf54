//! How translated code goes from place to place: direct branches, calls and returns.

use super::asm::{Imm, Mem, RSP, Two, at, cc};
use super::emit::{Cold, Emitter};
use super::registers::{A, B, C, STACK};
use super::state::field;
use super::stubs::{enter_page, go, look_up};
use iced_x86::OpKind;

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

impl Emitter<'_> {
    /// Goes on behind step `i`, the last of its run, wherever that is.
    pub(super) fn go_on(&mut self, i: usize) {
        match self.source.following(i) {
            Some(next) => {
                if self.source.wanted_before(next) != 0 {
                    self.save_flags();
                }
                let site = self.a.jmp();
                self.to_label(site, next);
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
            None => self.to_other_page(target),
        }
    }

    /// Goes to another page. Flags are stored.
    pub(super) fn to_other_page(&mut self, target: i64) {
        self.linear(target);
        let sites = look_up(&mut self.a);
        go(&mut self.a);
        self.cold.push(Cold::Elsewhere { sites: sites.into() });
    }

    /// Makes the branch at `site` a link to an offset in the page.
    fn link(&mut self, site: usize, target: u32) {
        self.cold.push(Cold::Unlinked { link: self.links.len() });
        self.links.push(NewLink { site, stub: 0, target });
    }

    /// The way of a link that leads nowhere yet.
    pub(super) fn unlinked(&mut self, link: usize) {
        self.a.bind(self.links[link].site);
        self.links[link].stub = self.a.here();
        self.a.constant(A, (self.first_link + link) as u64);
        self.jump_out(self.stubs.link);
    }

    pub(super) fn jump(&mut self, i: usize) -> Option<()> {
        let target = self.at(i).0.target();
        match self.source.inside(target) {
            Some(step) => {
                if self.source.wanted_before(step) != 0 {
                    self.save_flags();
                }
                let site = self.a.jmp();
                self.to_label(site, step);
            }
            None => self.exit_to(target),
        }
        Some(())
    }

    pub(super) fn branch(&mut self, i: usize) -> Option<()> {
        let (step, op) = self.at(i);
        let (condition, target, refund) = (op.condition, step.target(), step.behind);
        self.restore_flags(A);
        let inside = self.source.inside(target);
        let wanted = self.source.wanted_at(target) != 0;
        if inside.is_some() && wanted {
            // The host's flags stay as they are.
            self.save_flags();
        }
        let site = self.a.jcc(condition);
        let save = wanted && !self.stored_flags;
        match (inside, page_offset(target)) {
            (Some(to), _) if refund == 0 => self.to_label(site, to),
            (None, Some(target)) if refund == 0 && !save => self.link(site, target),
            _ => self.cold.push(Cold::Side { site, target, inside, save, refund }),
        }
        Some(())
    }

    /// Pushes the address behind step `i` to `slot`. Leaves it in [`B`].
    fn push_return(&mut self, i: usize, slot: Mem) {
        let next = self.at(i).0.next as i32;
        self.a.rm(Two::Load, B, field::page());
        self.a.rm(Two::Lea, B, at(B, next));
        self.a.rm(Two::Store, B, slot);
        self.a.rm(Two::Lea, STACK, at(STACK, -8));
    }

    /// Where the return from a call at step `i` comes back: takes the guest's return address, which is in [`A`] as well, off
    /// the host's stack. It may lie in the next page; the page is that of the call.
    fn come_back(&mut self, i: usize) {
        self.a.imm(Imm::Add, true, RSP, 8);
        let next = self.at(i).0.next as i32;
        self.a.rm(Two::Lea, A, at(A, -next));
        self.a.rm(Two::Store, A, field::page());
        (self.host_flags, self.stored_flags, self.level) = (false, true, None);
    }

    pub(super) fn call(&mut self, i: usize) -> Option<()> {
        let (slot, sites) = self.check_push(i);
        self.push_return(i, slot);
        self.save_flags();
        self.a.push(B);
        let target = self.at(i).0.target();
        let site = self.a.call();
        match page_offset(target) {
            Some(target) => self.link(site, target),
            None => self.cold.push(Cold::Tail { site, target }),
        }
        self.come_back(i);
        self.slow_unless_covered(i, sites);
        Some(())
    }

    /// The target of an indirect branch, looked up: its address is in [`A`], its entry in [`B`].
    fn indirect_target(&mut self, i: usize, sites: &mut Vec<usize>) -> Option<()> {
        let (step, op) = self.at(i);
        if step.instruction.op0_kind() == OpKind::Memory {
            self.address(i)?;
            sites.push(self.check(8, 1, false));
            self.a.rm(Two::Load, A, at(A, 0));
        } else {
            let number = op.dst;
            let from = self.fetch(number, A);
            self.a.copy(A, from);
        }
        sites.extend(look_up(&mut self.a));
        Some(())
    }

    pub(super) fn jump_indirect(&mut self, i: usize) -> Option<()> {
        self.save_flags();
        let mut sites = Vec::new();
        self.indirect_target(i, &mut sites)?;
        go(&mut self.a);
        self.slow(i, sites);
        Some(())
    }

    pub(super) fn call_indirect(&mut self, i: usize) -> Option<()> {
        self.save_flags();
        self.a.rm(Two::Lea, A, at(STACK, -8));
        let mut sites = vec![self.check(8, 1, true)];
        self.a.rm(Two::Store, A, field::slot());
        self.indirect_target(i, &mut sites)?;
        // Nothing can go wrong from here on.
        self.a.copy(C, B);
        self.a.rm(Two::Load, A, field::slot());
        self.push_return(i, at(A, 0));
        self.a.rm(Two::Load, A, at(C, 0));
        enter_page(&mut self.a);
        self.a.push(B);
        self.a.call_mem(at(C, 16));
        self.come_back(i);
        self.slow(i, sites);
        Some(())
    }

    pub(super) fn ret(&mut self, i: usize) -> Option<()> {
        let released = self.at(i).1.immediate & 0xffff;
        if released != 0 {
            return None;
        }
        // A row keeps its address in A.
        self.save_flags_with(B);
        let (slot, sites) = self.check_pop(i);
        self.a.rm(Two::Load, A, slot);
        self.a.rm(Two::Cmp, A, at(RSP, 8));
        let site = self.a.jcc(cc::NE);
        self.a.rm(Two::Lea, STACK, at(STACK, 8));
        self.a.ret();
        self.cold.push(Cold::Return { site, step: i });
        self.slow_unless_covered(i, sites);
        Some(())
    }

    /// A return that does not match the call on top.
    pub(super) fn cold_return(&mut self, site: usize, step: usize) {
        self.a.bind(site);
        let id = self.site(step);
        self.a.constant(C, id);
        self.jump_out(self.stubs.ret);
    }
}

/// A target in the page.
fn page_offset(target: i64) -> Option<u32> {
    u32::try_from(target).ok().filter(|&target| target < 0x1000)
}
