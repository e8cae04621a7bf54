//! From a decoded region to host code.
//!
//! Guest flags stay in the host's flags as long as nothing comes between. A check of an address needs the host's
//! flags, so before it they are stored where anybody still wants them, and loaded again only when an instruction looks at
//! them or keeps some of them. [`Emitter::host_flags`] and [`Emitter::stored_flags`] say where they are. At a label they
//! are in the vCPU, if anybody wants them.
//!
//! Whatever a check does not cover runs out of line ([`Emitter::slow`]): the interpreter's handler executes the whole
//! instruction, with all its faults and side effects, and translated code goes on behind it.

use iced_x86::{Encoder, Instruction};

use super::apart::Row;
use super::asm::{Assembler, Mem, RAX, Reg, Two, at};
use super::cold::{Fixed, Side};
use super::gather::Undo;
use super::group::Group;
use super::helper::{Site, marks};
use super::kept::Kept;
use super::laps::Laps;
use super::links::NewLink;
use super::loops::Loop;
use super::native::Kind;
use super::output::{Output, Spare};
use super::region::Source;
use super::registers::{A, B};
use super::state::field;
use super::step::Step;
use super::stubs::Stubs;
use super::unmasked::Point;
use super::x87::carries_record;
use crate::interp::op::Op;
use crate::vector::pass::Units;

/// The state of translation.
pub(super) struct Emitter<'a> {
    pub(super) a: Assembler,
    pub(super) source: &'a Source,
    pub(super) stubs: &'a Stubs,
    encoder: Box<Encoder>,
    /// Offset in the arena where the code will be.
    pub(super) base: usize,
    pub(super) fixed: Vec<Fixed>,
    pub(super) sides: Vec<Side>,
    /// Where gathers and scatters are left.
    pub(super) undos: Vec<Undo>,
    /// Branches that lead to fixed code.
    pub(super) misses: Vec<usize>,
    pub(super) links: Vec<NewLink>,
    /// Index of the first of `links` in the cache.
    pub(super) first_link: usize,
    /// Those to other pages, and how many there are in the cache already.
    pub(super) crossings: usize,
    pub(super) first_crossing: usize,
    /// What handlers are called for, by step.
    pub(super) sites: Vec<Site>,
    /// Index of the first of `sites` in the cache.
    pub(super) first_site: usize,
    /// Instructions that may raise floating-point exceptions.
    pub(super) points: Vec<Point>,
    /// Rows that may have to run apart.
    pub(super) rows: Vec<Row>,
    /// Index of the first of `rows` in the cache.
    pub(super) first_row: usize,
    /// The host's flags are the guest's.
    pub(super) host_flags: bool,
    /// The flags in the vCPU are the guest's.
    pub(super) stored_flags: bool,
    /// What is known to be in the host's registers.
    pub(super) units: Units,
    /// The step that the x87 unit's record is about, if it has yet to be written ([`super::x87`]).
    pub(super) record: Option<usize>,
    /// Branches taken where the segment of the operand in memory of the step under way does not permit the access.
    pub(super) segment_misses: [Option<usize>; 2],
    /// The row under way: its addresses have been checked.
    pub(super) group: Option<Group>,
    /// How far the row under way has yet to move the stack pointer.
    pub(super) pending: i32,
    /// Registers in scratch ones.
    pub(super) kept: Kept,
    /// Loops that are translated a second time.
    pub(super) loops: Vec<Loop>,
    /// That is under way, and where the operand in memory of the step under way is then.
    pub(super) laps: Laps,
    pub(super) operand: Option<Mem>,
    /// Steps besides the first at which the code can be entered, and where that is in the arena.
    entries: Vec<(usize, usize)>,
    /// Where labels are, by step.
    labels: Vec<Option<usize>>,
    /// Branches to labels that were not there yet.
    forward: Vec<(usize, usize)>,
}

impl std::fmt::Debug for Emitter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Emitter").field("base", &self.base).finish_non_exhaustive()
    }
}

/// Where a region's code will be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Offset in the arena.
    pub(super) base: usize,
    /// Offset of the end of the room in the arena: what is rarely executed goes there.
    pub(super) end: usize,
    /// Links, links to other pages, sites and rows that there are already.
    pub(super) links: usize,
    pub(super) crossings: usize,
    pub(super) sites: usize,
    pub(super) rows: usize,
}

/// Translates a region, in the memory of what is not needed any more.
pub(super) fn emit(source: &Source, stubs: &Stubs, place: Place, old: Output) -> Output {
    let total = source.steps.len();
    let mut e = Emitter::new(source, stubs, place, old);
    if let Some(second) = source.second {
        e.check_second_page(second);
    }
    let mut interpreted = 0;
    let mut open = true;
    let mut i = 0;
    while i < total {
        e.arrive(i, open);
        let end = match e.try_row(i).or_else(|| e.try_stretch(i)) {
            Some(end) => {
                open = !closes(source.steps[end - 1].kind);
                end
            }
            None => {
                let done = e.step(i);
                interpreted += usize::from(!done.native);
                open = done.open;
                i + 1
            }
        };
        if open && source.steps[end - 1].last {
            open = source.following(end - 1) == Some(end);
            if !open {
                e.settle_record(A);
                e.go_on(end - 1);
            }
        }
        i = end;
    }
    e.emit_loops();
    e.emit_sides();
    let split = e.a.here();
    let mut output = e.finish(place, split);
    output.interpreted = interpreted;
    output
}

/// Translates the steps of a row, each with its own check.
pub(super) fn emit_apart(row: &Row, source: &Source, stubs: &Stubs, place: Place, old: Output) -> Output {
    let mut e = Emitter::new(source, stubs, place, old);
    e.a.begin_part(0);
    e.apart(row);
    e.finish(place, 0)
}

/// Whether control never reaches the instruction behind, if this one is translated natively.
fn closes(kind: Kind) -> bool {
    use Kind as K;
    matches!(
        kind,
        K::Jump
            | K::JumpIndirect
            | K::Return
            | K::SystemCall
            | K::SystemReturn
            | K::SystemEnter
            | K::SoftwareInterrupt
            | K::SystemReturnNarrow
            | K::InterruptReturn
    )
}

/// What became of a step.
pub(super) struct Done {
    native: bool,
    /// Control can reach the instruction behind.
    pub(super) open: bool,
}

/// How far emission has come, so that what follows can be taken back.
pub(super) struct Mark {
    code: usize,
    fixed: usize,
    sides: usize,
    undos: usize,
    links: usize,
    crossings: usize,
    sites: usize,
    points: usize,
    forward: usize,
    state: (bool, bool, Units, Option<usize>),
}

impl<'a> Emitter<'a> {
    fn new(source: &'a Source, stubs: &'a Stubs, place: Place, old: Output) -> Self {
        let Output { assembler, links, entries, sites, points, rows, spare, .. } = old;
        let Spare { encoder, fixed, sides, loops, misses, labels, forward } = spare;
        let mut e = Self {
            a: assembler,
            source,
            stubs,
            encoder,
            base: place.base,
            fixed,
            sides,
            undos: Vec::new(),
            misses,
            links,
            first_link: place.links,
            crossings: 0,
            first_crossing: place.crossings,
            entries,
            sites,
            first_site: place.sites,
            points,
            rows,
            first_row: place.rows,
            host_flags: false,
            stored_flags: true,
            units: Units::NONE,
            record: None,
            segment_misses: [None; 2],
            group: None,
            pending: 0,
            kept: Kept::NOTHING,
            loops,
            laps: Laps::None,
            operand: None,
            labels,
            forward,
        };
        e.clear(source.steps.len());
        e
    }

    /// Makes room for a region of `total` steps.
    fn clear(&mut self, total: usize) {
        self.a.clear();
        self.fixed.clear();
        self.sides.clear();
        self.loops.clear();
        self.misses.clear();
        self.links.clear();
        self.entries.clear();
        self.sites.clear();
        self.points.clear();
        self.rows.clear();
        self.forward.clear();
        self.labels.clear();
        self.labels.resize(total, None);
    }

    /// Emits what is out of the way, behind the first `split` bytes, and puts everything in place.
    fn finish(mut self, place: Place, split: usize) -> Output {
        debug_assert!(self.record.is_none(), "a record is written before anything can look at it");
        self.a.begin_part(split);
        self.emit_unlinked();
        self.emit_undos();
        self.emit_recorded();
        for &(site, step) in &self.forward {
            if let Some(at) = self.labels[step] {
                self.a.patch(site, at as i64);
            }
        }
        let rare = self.a.here() + self.length_of_fixed() - split;
        let place_of_rare = place.end.wrapping_sub(rare);
        let moved = place_of_rare as i64 - (place.base + split) as i64;
        self.a.move_part(moved);
        self.emit_fixed(split, moved);
        let in_place =
            |at: usize| if at < split { place.base + at } else { place_of_rare.wrapping_add(at - split) };
        for link in &mut self.links {
            link.put(in_place);
        }
        let record = |at: &mut u32| *at = in_place(*at as usize) as u32;
        for site in &mut self.sites {
            record(&mut site.back);
            record(&mut site.again);
        }
        for point in &mut self.points {
            record(&mut point.at);
        }
        for row in &mut self.rows {
            row.put(record);
        }
        let labels = self.labels.iter().enumerate().skip(1);
        self.entries.extend(labels.filter_map(|(step, label)| Some((step, place.base + (*label)?))));
        let spare = Spare {
            encoder: self.encoder,
            fixed: self.fixed,
            sides: self.sides,
            loops: self.loops,
            misses: self.misses,
            labels: self.labels,
            forward: self.forward,
        };
        Output {
            assembler: self.a,
            split,
            links: self.links,
            entries: self.entries,
            sites: self.sites,
            points: self.points,
            rows: self.rows,
            interpreted: 0,
            spare,
        }
    }

    /// Where emission is.
    pub(super) fn mark(&self) -> Mark {
        Mark {
            code: self.a.here(),
            fixed: self.fixed.len(),
            sides: self.sides.len(),
            undos: self.undos.len(),
            links: self.links.len(),
            crossings: self.crossings,
            sites: self.sites.len(),
            points: self.points.len(),
            forward: self.forward.len(),
            state: (self.host_flags, self.stored_flags, self.units, self.record),
        }
    }

    /// Takes back what was emitted since, outside of rows.
    pub(super) fn take_back(&mut self, mark: &Mark) {
        (self.group, self.pending, self.kept) = (None, 0, Kept::NOTHING);
        self.segment_misses = [None; 2];
        self.a.truncate(mark.code);
        self.fixed.truncate(mark.fixed);
        self.sides.truncate(mark.sides);
        self.undos.truncate(mark.undos);
        self.links.truncate(mark.links);
        self.crossings = mark.crossings;
        self.sites.truncate(mark.sites);
        self.points.truncate(mark.points);
        self.forward.truncate(mark.forward);
        (self.host_flags, self.stored_flags, self.units, self.record) = mark.state;
    }

    #[inline(always)]
    pub(super) fn at(&self, i: usize) -> (&'a Step, &'a Op) {
        let step = &self.source.steps[i];
        (step, &step.op)
    }

    /// What comes before step `i`: its label, and its unit's budget. `open`: the code before leads here.
    fn arrive(&mut self, i: usize, open: bool) {
        let step = &self.source.steps[i];
        let wanted = self.source.wanted_before(i) != 0;
        if step.label {
            self.settle_record(A);
            if open && wanted {
                self.save_flags();
            }
            self.labels[i] = Some(self.a.here());
            (self.host_flags, self.stored_flags, self.units) = (false, true, Units::NONE);
        }
        if step.unit != 0 {
            if wanted {
                self.save_flags();
            }
            self.host_flags = false;
            // Nobody looks at flags that are not wanted.
            self.stored_flags = true;
            self.arrive_behind_loop(i);
            self.take_off_budget(i);
        }
    }

    /// Translates step `i`, by its handler if need be.
    pub(super) fn step(&mut self, i: usize) -> Done {
        let step = &self.source.steps[i];
        let kind = step.kind;
        if kind == Kind::Same && step.stays {
            self.put_as_it_is(step);
            return Done { native: true, open: true };
        }
        if !carries_record(kind) {
            self.settle_record(A);
        }
        let mark = self.mark();
        if self.native(i, kind).is_some() {
            return Done { native: true, open: !closes(kind) };
        }
        self.take_back(&mark);
        self.interpreted(i);
        Done { native: false, open: !self.ends(i) }
    }

    /// Step `i` in host code; `None` if it has none.
    pub(super) fn native(&mut self, i: usize, kind: Kind) -> Option<()> {
        match kind {
            Kind::Same => self.same(i),
            Kind::Vector => self.vector(i),
            Kind::Gather => self.gather(i),
            Kind::Scatter => self.scatter(i),
            Kind::MaskedBytes => self.masked_bytes(i),
            Kind::LoadControl => self.load_control(i),
            Kind::LoadMxcsr => self.load_mxcsr(i),
            Kind::Divide => self.divide(i, false),
            Kind::DivideSigned => self.divide(i, true),
            Kind::Address => self.load_address(i),
            Kind::PushMemory => self.push_memory(i),
            Kind::PopMemory => self.pop_memory(i),
            Kind::PushFlags => self.push_flags(i),
            Kind::PopFlags => self.pop_flags(i),
            Kind::ClearInterrupts => self.clear_interrupts(i),
            Kind::SetInterrupts => self.set_interrupts(i),
            Kind::ClearAc => self.access_user_pages(i, false),
            Kind::SetAc => self.access_user_pages(i, true),
            Kind::SwapGs => self.swap_gs(i),
            Kind::SystemCall => self.system_call(i),
            Kind::SystemReturn => self.return_by(i, self.stubs.system_return),
            Kind::SystemEnter => self.system_enter(i),
            Kind::SystemReturnNarrow => self.system_return_narrow(i),
            Kind::SoftwareInterrupt => self.software_interrupt(i),
            Kind::InterruptReturn => self.return_by(i, self.stubs.interrupt_return),
            Kind::StoreString => self.store_string(i),
            Kind::MoveString => self.move_string(i),
            Kind::LoadString => self.load_string(i),
            Kind::ScanString => self.scan_string(i),
            Kind::CompareString => self.compare_string(i),
            Kind::ClearDirection => self.clear_direction(),
            Kind::SetDirection => self.set_direction(),
            Kind::TranslateByte => self.translate_byte(i),
            Kind::Selector => self.selector(i),
            Kind::ReadControl => self.read_control(i),
            Kind::ReadTime => self.read_time(i),
            Kind::ReadBase => self.read_base(i),
            Kind::WriteBase => self.write_base(i),
            Kind::BitString => self.bit_string(i),
            Kind::Push => self.push(i),
            Kind::Pop => self.pop(i),
            Kind::Leave => self.leave(i),
            Kind::Enter => self.enter(i),
            Kind::PushWord => self.push_word(i),
            Kind::PopWord => self.pop_word(i),
            Kind::ReadProcessor => self.read_processor(i),
            Kind::FlushLine => self.flush_line(i),
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
        self.settle_record(A);
        self.save_flags();
        self.call_handler(i);
        (self.host_flags, self.units) = (false, Units::NONE);
        if self.ends(i) {
            self.follow_rip();
        }
    }

    /// Calls the handler of step `i`.
    pub(super) fn call_handler(&mut self, i: usize) {
        let id = self.site(i);
        self.call_site(id);
    }

    /// Calls the handler of a site.
    pub(super) fn call_site(&mut self, id: u64) {
        self.a.constant(A, id);
        self.call_out(self.stubs.interpret);
    }

    /// The number under which step `i` is known to its handler's caller.
    pub(super) fn site(&mut self, i: usize) -> u64 {
        let site = self.site_of(i);
        self.add_site(site)
    }

    /// What is to be known of step `i` when its handler is called.
    pub(super) fn site_of(&self, i: usize) -> Site {
        let step = &self.source.steps[i];
        let mut marks = 0;
        if self.ends(i) {
            marks |= marks::ENDS;
        }
        if super::helper::resumes(step.op.code) {
            marks |= marks::RESUMES;
        }
        if self.source.careful {
            marks |= marks::CAREFUL;
        }
        let (next, behind) = (step.next as u16, step.behind);
        Site { op: step.op, back: 0, again: 0, next, behind, limit: 0, level: 0, marks }
    }

    pub(super) fn add_site(&mut self, site: Site) -> u64 {
        self.sites.push(site);
        (self.first_site + self.sites.len() - 1) as u64
    }

    /// Whether nothing of the region can follow step `i` after its handler: it goes anywhere, or changes what everything
    /// depends on.
    pub(super) fn ends(&self, i: usize) -> bool {
        let step = &self.source.steps[i];
        step.last
            && matches!(
                step.kind,
                Kind::Interpreted
                    | Kind::StoreString
                    | Kind::MoveString
                    | Kind::LoadString
                    | Kind::ScanString
                    | Kind::CompareString
                    | Kind::PopFlags
                    | Kind::Jump
                    | Kind::Branch
                    | Kind::Call
                    | Kind::CallIndirect
                    | Kind::JumpIndirect
                    | Kind::Return
                    | Kind::SystemCall
                    | Kind::SystemReturn
                    | Kind::SystemEnter
                    | Kind::SoftwareInterrupt
                    | Kind::SystemReturnNarrow
                    | Kind::InterruptReturn
            )
    }

    /// Goes where a handler has put RIP.
    pub(super) fn follow_rip(&mut self) {
        self.a.rm(Two::Load, A, field::rip());
        self.jump_out(self.stubs.dispatch);
    }

    /// Jumps to fixed code.
    pub(super) fn jump_out(&mut self, target: usize) {
        self.a.jmp_to(target as i64 - self.base as i64);
    }

    /// Calls fixed code.
    pub(super) fn call_out(&mut self, target: usize) {
        self.a.call_to(target as i64 - self.base as i64);
    }

    /// Makes the branch at `site` lead to the label of a step.
    pub(super) fn lead_to_label(&mut self, site: usize, step: usize) {
        match self.labels[step] {
            Some(at) => self.a.patch(site, at as i64),
            None => self.forward.push((site, step)),
        }
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
            self.a.store_word(RAX, field::status());
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

    /// The linear address at `offset` from the page's start to [`A`].
    pub(super) fn linear(&mut self, offset: i64) {
        self.a.rm(Two::Load, A, field::page());
        match i32::try_from(offset) {
            Ok(0) => {}
            Ok(offset) => self.lea(A, at(A, offset)),
            Err(_) if self.is_narrow() => self.lea(A, at(A, offset as i32)),
            Err(_) => {
                self.a.constant(B, offset as u64);
                self.a.rm(Two::Lea, A, Mem { base: Some(A), index: Some((B, 0)), disp: 0 });
            }
        }
    }
}

/// The guest's flags from the vCPU to the host's; RAX spends the time in `scratch`.
pub(super) fn load_flags(a: &mut Assembler, scratch: Reg) {
    a.copy(scratch, RAX);
    a.load_word(RAX, field::status());
    a.bytes(&[0x04, 0x7f]); // add al, 0x7f: sets OF if AL was 1
    a.bytes(&[0x9e]); // sahf
    a.copy(RAX, scratch);
}
