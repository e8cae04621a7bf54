//! Runs of code of either mode, for the translator.

use iced_x86::Instruction;
use ringfence_memory::GuestAddress;

use super::code_address::CodeAddress;
use super::cpu::{CodeSize, Cpu};
use super::decode::{Decoded, MAX_LENGTH, decode_one, translate_fetch, with_tail};
use super::found::{Found, find, marks};
use super::layout::LOOKED_AT;
use super::op::Op;
use super::window::{Code64, Window};

/// Takes what is found.
pub trait Sink {
    /// Where the next operation is to be written.
    fn room(&mut self) -> &mut Op;

    /// Takes an instruction, or what is none and raises an exception; its operation has been written. Whether to go on.
    fn take(&mut self, found: &Found<'_>) -> bool;
}

/// Finds instructions from `address` on, to the end of the page or until `on` has had enough, which tells whether
/// to go on. What is truncated is not found.
#[inline(always)]
fn walk<S: Sink>(
    cpu: &mut Cpu,
    address: CodeAddress,
    sink: &mut S,
    mut on: impl FnMut(&mut S, &Found<'_>) -> bool,
) {
    let mut window = Window::take(cpu);
    let mut decoded = Instruction::default();
    let mut next = address;
    while next.page() == address.page() {
        let code = window.at(cpu, next.physical());
        let found = if address.is_narrow() {
            find_narrow(cpu, code, &mut decoded, sink.room())
        } else {
            find::<false>(cpu, code, &mut decoded, sink.room())
        };
        let Some(found) = found else { break };
        next = next.behind(found.length.into());
        if !on(sink, &found) {
            break;
        }
    }
    window.put_back(cpu);
}

/// Forgets the bytes that [`decode_run`] and [`peek`] have read: another region is decoded next.
pub fn begin(cpu: &mut Cpu) {
    if let Some(window) = &mut cpu.window {
        window.forget();
    }
}

/// Decodes up to `most` instructions from `address` to the end of the page, past conditional branches, and hands each to
/// `sink`; one that does not exist is the last.
#[inline(always)]
pub fn decode_run(cpu: &mut Cpu, address: CodeAddress, most: usize, sink: &mut impl Sink) {
    let mut left = most;
    walk(cpu, address, sink, |sink, found| {
        left -= 1;
        let ends = found.has(marks::ENDS) && !found.has(marks::PASSES);
        sink.take(found) && !ends && left > 0
    });
}

/// Hands up to `most` instructions from `address` on to `sink`, as long as they can be decoded, and the page lasts.
/// Their bytes are marked as code.
pub fn peek(cpu: &mut Cpu, address: CodeAddress, most: usize, sink: &mut impl Sink) {
    let mut left = most;
    walk(cpu, address, sink, |sink, found| {
        left -= 1;
        found.exists() && sink.take(found) && left > 0
    });
}

/// Hands the instruction at `linear`, whose first byte is at `address` and whose last is in the next page, to `sink`:
/// the physical address of that page. `None` if it is another kind of instruction or cannot be fetched now.
pub fn decode_straddling(
    cpu: &mut Cpu,
    linear: u64,
    address: CodeAddress,
    sink: &mut impl Sink,
) -> Option<GuestAddress> {
    let mut window = Window::take(cpu);
    let head = window.at(cpu, address.physical()).bytes().to_vec();
    window.put_back(cpu);
    let size = if address.is_narrow() { CodeSize::Bits32 } else { CodeSize::Bits64 };
    if head.len() >= MAX_LENGTH || !matches!(decode_one(cpu, &head, size), Decoded::Truncated) {
        return None;
    }
    let second = translate_fetch(cpu, (linear | 0xfff).wrapping_add(1)).ok()?;
    let all = with_tail(cpu, &head, second);
    let code = Code64 { all: all.first_chunk().unwrap_or(&[0; LOOKED_AT]), length: MAX_LENGTH };
    let mut decoded = Instruction::default();
    let found = if address.is_narrow() {
        find_narrow(cpu, code, &mut decoded, sink.room())
    } else {
        find::<false>(cpu, code, &mut decoded, sink.room())
    }?;
    found.exists().then(|| sink.take(&found)).map(|_| second)
}

/// [`find`] of 32-bit code, which is not worth a copy wherever 64-bit code is found.
#[inline(never)]
fn find_narrow<'a>(
    cpu: &'a mut Cpu,
    code: Code64<'a>,
    decoded: &'a mut Instruction,
    op: &mut Op,
) -> Option<Found<'a>> {
    find::<true>(cpu, code, decoded, op)
}
