//! Fields of the vCPU as operands of translated code.

use super::*;

macro_rules! fields {
    ($($name:ident),* $(,)?) => {$(
        #[inline(always)]
        pub(in super::super) fn $name() -> Mem {
            at(PIN, distance(offset_of!(Cpu, translated) + offset_of!(State, $name)))
        }
    )*};
}

#[inline(always)]
fn at_distance(offset: usize) -> Mem {
    at(PIN, distance(offset))
}

macro_rules! fields_of_cpu {
    ($($name:ident),* $(,)?) => {$(
        #[inline(always)]
        pub(in super::super) fn $name() -> Mem {
            at_distance(offset_of!(Cpu, $name))
        }
    )*};
}

fields!(
    data_table,
    user_table,
    budget,
    page,
    jumps,
    code_tag,
    fetch_table,
    context,
    entry,
    slot,
    interpret,
    link,
    base,
    vectors,
    level,
    passing,
    stack_page,
    stack_host,
    no_stack,
    inbox,
    time_line,
    sites,
    rows,
    crossings,
    writable,
    apart,
    bring_x87,
    raised,
    stack_slot,
    x87_control,
    x87,
    arena,
    onward,
    stale_flag,
    star,
    system_table,
    targets,
    laps_end
);

fields_of_cpu!(cpl, flags, class, cr0, cr2, cr3, cr4, efer, nmi_masked, code_size, stack_mask);

fn of_state(offset: usize) -> Mem {
    at_distance(offset_of!(Cpu, translated) + offset)
}

/// What [`context`] says of the translations that code is fetched through, 32 bits.
pub(in super::super) fn code_generation() -> Mem {
    of_state(offset_of!(State, context) + 4)
}

/// The host address of a row's base.
pub(in super::super) fn base_host(place: usize) -> Mem {
    of_state(offset_of!(State, base_hosts) + 8 * place)
}

/// Where a scratch register is put by.
pub(in super::super) fn scratch(place: usize) -> Mem {
    of_state(offset_of!(State, scratch) + 8 * place)
}

fn privilege(user: bool, offset: usize) -> Mem {
    of_state(offset_of!(State, privileges) + usize::from(user) * size_of::<Privilege>() + offset)
}

/// What the targets of branches depend on at CPL 3 (`user`) or at CPL 0.
pub(in super::super) fn context_of(user: bool) -> Mem {
    privilege(user, offset_of!(Privilege, context))
}

/// The table of fetches at CPL 3 (`user`) or at CPL 0.
pub(in super::super) fn fetch_table_of(user: bool) -> Mem {
    privilege(user, offset_of!(Privilege, fetch_table))
}

/// CS and SS of CPL 3 (`user`) or CPL 0 as STAR has them, word by word, and where they go.
pub(in super::super) fn code_and_stack(user: bool) -> impl Iterator<Item = (Mem, Mem)> {
    const { assert!(SegmentRegister::Ss as usize == SegmentRegister::Cs as usize + 1) };
    (0..2 * size_of::<Segment>())
        .step_by(8)
        .map(move |at| (privilege(user, offset_of!(Privilege, segments) + at), code_segment(at)))
}

/// What is so many bytes behind the start of CS, which SS follows.
pub(in super::super) fn code_segment(at: usize) -> Mem {
    at_distance(self::segment(SegmentRegister::Cs as u8) + at)
}

/// So many bytes behind the start of what SYSENTER and SYSRET need for 32-bit code.
pub(in super::super) fn compat(at: usize) -> Mem {
    of_state(offset_of!(State, compat) + at)
}

/// So many bytes behind the start of what is known of INT n.
pub(in super::super) fn gate(at: usize) -> Mem {
    of_state(offset_of!(State, gate) + at)
}

/// The base of the interrupt descriptor table.
pub(in super::super) fn idt_base() -> Mem {
    at_distance(offset_of!(Cpu, idtr) + offset_of!(DescriptorTable, base))
}

/// Its limit, 16 bits.
pub(in super::super) fn idt_limit() -> Mem {
    at_distance(offset_of!(Cpu, idtr) + offset_of!(DescriptorTable, limit))
}

/// The base of the task-state segment.
pub(in super::super) fn tr_base() -> Mem {
    at_distance(offset_of!(Cpu, tr) + offset_of!(Segment, base))
}

/// Its limit, 32 bits.
pub(in super::super) fn tr_limit() -> Mem {
    at_distance(offset_of!(Cpu, tr) + offset_of!(Segment, limit))
}

/// What accesses a segment permits to all of 4 GiB from 0: a byte of [`Cpu::flat`].
pub(in super::super) fn flat(segment: u8) -> Mem {
    at_distance(offset_of!(Cpu, flat) + usize::from(segment))
}

/// So many bytes behind the start of what is known of IRET.
pub(in super::super) fn returns(at: usize) -> Mem {
    of_state(offset_of!(State, returns) + at)
}

/// The base of the global descriptor table.
pub(in super::super) fn gdt_base() -> Mem {
    at_distance(offset_of!(Cpu, gdtr) + offset_of!(DescriptorTable, base))
}

/// Its limit, 16 bits.
pub(in super::super) fn gdt_limit() -> Mem {
    at_distance(offset_of!(Cpu, gdtr) + offset_of!(DescriptorTable, limit))
}

/// What that is of segments by STAR.
pub(in super::super) fn flat_by_star() -> Mem {
    of_state(offset_of!(State, flat_by_star))
}

/// Whether CS and SS span all 4 GiB, 16 bits.
pub(in super::super) fn flat_code_and_stack() -> Mem {
    at_distance(offset_of!(Cpu, flat) + SegmentRegister::Cs as usize)
}

/// The table for supervisor accesses, without or with access to user pages.
pub(in super::super) fn kernel_table(user_pages: bool) -> Mem {
    of_state(offset_of!(State, kernel_tables) + 8 * usize::from(user_pages))
}

fn segment(segment: u8) -> usize {
    offset_of!(Cpu, segments) + usize::from(segment) * size_of::<Segment>()
}

/// The base of FS or GS, as it is and as it is used.
pub(in super::super) fn base_of(segment: u8) -> [Mem; 2] {
    let own = self::segment(segment) + offset_of!(Segment, base);
    [at_distance(own), segment_base(segment)]
}

/// A segment register's attributes, 16 bits.
pub(in super::super) fn attributes(segment: u8) -> Mem {
    at_distance(self::segment(segment) + offset_of!(Segment, attributes))
}

/// What accesses a segment permits to all of 4 GiB: a byte of [`Cpu::spans`].
pub(in super::super) fn spans(segment: u8) -> Mem {
    at_distance(offset_of!(Cpu, spans) + usize::from(segment))
}

/// A segment register's selector, 16 bits.
pub(in super::super) fn selector(segment: u8) -> Mem {
    at_distance(self::segment(segment) + offset_of!(Segment, selector))
}

/// A model-specific register that is kept apart.
pub(in super::super) fn msr(number: u32) -> Mem {
    at_distance(offset_of!(Cpu, msrs) + Msrs::distance(number))
}

/// A guest register's slot.
pub(in super::super) fn register(number: u8) -> Mem {
    at(PIN, 8 * i32::from(number))
}

/// What the x87 unit records, by its offset in [`crate::vector::Vector`].
pub(in super::super) fn x87_record(offset: usize) -> Mem {
    at_distance(offset_of!(Cpu, vector) + offset)
}

/// RIP.
pub(in super::super) fn rip() -> Mem {
    at(PIN, 8 * RIP as i32)
}

/// So many bytes behind the start of [`Cpu::lanes`].
pub(in super::super) fn lanes(at: usize) -> Mem {
    at_distance(offset_of!(Cpu, lanes) + at)
}

/// The arithmetic flags, 16 bits.
pub(in super::super) fn status() -> Mem {
    at(PIN, distance(offset_of!(Cpu, status)))
}

/// The base that a segment adds.
pub(in super::super) fn segment_base(segment: u8) -> Mem {
    at(PIN, distance(offset_of!(Cpu, bases)) + 8 * i32::from(segment))
}
