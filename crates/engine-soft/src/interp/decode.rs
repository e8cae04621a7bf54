//! From bytes in guest memory to blocks of operations.

use iced_x86::{Code, Decoder, DecoderError, FlowControl, Instruction, Mnemonic};
use ringfence_memory::GuestAddress;
use ringfence_x86::Exception;

use super::block::{Block, BlockKey};
use super::cpu::{CodeSize, Cpu};
use super::op::{Op, prefix};
use super::system;
use crate::code::GRANULE;
use crate::mmu::tlb::Page;
use crate::mmu::walk::{Access, Rights, translate};
use crate::vector;

/// Most instructions in a block.
const MAX_BLOCK: usize = 32;
/// Longest instruction in bytes (SDM 2A 2.3.11).
const MAX_LENGTH: usize = 15;

/// Physical address of the code byte at a linear address.
///
/// # Errors
/// #PF, or #GP(0) for a non-canonical address.
#[inline]
pub fn translate_fetch(cpu: &mut Cpu, linear: u64) -> Result<GuestAddress, Exception> {
    match cpu.tlb.fetch(cpu.cpl == 3, linear) {
        Some(address) => Ok(GuestAddress(address)),
        None => walk_fetch(cpu, linear),
    }
}

#[cold]
fn walk_fetch(cpu: &mut Cpu, linear: u64) -> Result<GuestAddress, Exception> {
    let user = cpu.cpl == 3;
    if cpu.long_mode() && !ringfence_x86::paging::is_canonical(linear) {
        return Err(Exception::GP0);
    }
    let rights = Rights { user, smap_open: true };
    match translate(&cpu.memory, &cpu.walk_context(), linear, Access::Fetch, rights) {
        Ok(found) => {
            let page = Page { size: found.page_size, global: found.global };
            // Translated code finds its way by these entries, and none leads to where it must not run.
            if !crate::jit::must_interpret(cpu, linear, found.address) {
                cpu.tlb.fill_fetch(user, linear, found.address.0, page);
            }
            Ok(found.address)
        }
        Err(fault) => {
            cpu.fault_address = linear;
            Err(Exception::with_code(ringfence_x86::Vector::PageFault, fault.0.bits()))
        }
    }
}

/// Bytes of one page, read by whole granules, which are marked as code before they are read.
struct Window {
    bytes: Vec<u8>,
    /// Where the next granule starts.
    next: GuestAddress,
    page: GuestAddress,
}

impl Window {
    fn new(start: GuestAddress) -> Self {
        Self::within(Vec::with_capacity(128), start)
    }

    /// One in the memory of another.
    fn within(mut bytes: Vec<u8>, start: GuestAddress) -> Self {
        bytes.clear();
        Self { bytes, next: start, page: start.page() }
    }

    /// Whether the page goes on behind what has been read.
    fn has_more(&self) -> bool {
        self.next.page() == self.page
    }

    /// Reads on until `wanted` bytes are there or the page ends.
    fn want(&mut self, cpu: &mut Cpu, wanted: usize) {
        let old = self.bytes.len();
        if old >= wanted || !self.has_more() {
            return;
        }
        let end = (self.next.0 + (wanted - old) as u64).next_multiple_of(GRANULE).min(self.page.0 + 0x1000);
        let len = end - self.next.0;
        match cpu.memory.page(self.next) {
            Some(page) => {
                if cpu.code.mark(self.next, len) {
                    cpu.tlb.protect(page.host);
                }
                self.bytes.resize(old + len as usize, 0);
                // The page was there a moment ago and regions never go away.
                let _ = cpu.memory.read_bytes(self.next, &mut self.bytes[old..]);
            }
            // Nothing answers there: the bus floats high.
            None => self.bytes.extend(std::iter::repeat_n(0xff, len as usize)),
        }
        self.next.0 = end;
    }
}

/// Decodes a block at `linear`, whose first byte is at `address`.
///
/// # Errors
/// #PF if the first instruction runs into a page that cannot be fetched from.
pub fn decode_block(cpu: &mut Cpu, linear: u64, address: GuestAddress) -> Result<Block, Exception> {
    let size = cpu.code_size;
    let key = BlockKey { address, size };
    let mut window = Window::new(address);
    let mut ops = Vec::new();
    let mut offset = 0;
    while ops.len() < MAX_BLOCK {
        window.want(cpu, offset + MAX_LENGTH);
        let bytes = &window.bytes[offset..];
        match decode_one(cpu, bytes, size) {
            Decoded::Instruction(instruction) => {
                ops.push(lower(cpu, &instruction, bytes));
                offset += instruction.len();
                if ends_block(&instruction, size) || address.page_offset() + offset as u64 >= 0x1000 {
                    break;
                }
            }
            Decoded::Bad(op) => {
                offset += usize::from(op.length);
                ops.push(op);
                break;
            }
            Decoded::Truncated if ops.is_empty() => return straddling(cpu, linear, key, bytes),
            Decoded::Truncated => break,
        }
    }
    Ok(Block { key, ops: ops.into(), length: offset as u32, second_page: None })
}

/// Decodes 64-bit code from `address` on, to the end of the page or until `each` has had enough: it is given what was decoded, with
/// the bytes from its first one on, and tells whether to go on. What is truncated is the last.
fn walk(cpu: &mut Cpu, address: GuestAddress, each: impl FnMut(&mut Cpu, Decoded, &[u8]) -> bool) {
    let mut window = Window::within(std::mem::take(&mut cpu.window), address);
    walk_window(cpu, &mut window, each);
    cpu.window = window.bytes;
}

fn walk_window(cpu: &mut Cpu, window: &mut Window, mut each: impl FnMut(&mut Cpu, Decoded, &[u8]) -> bool) {
    let mut offset = 0;
    loop {
        window.want(cpu, offset + MAX_LENGTH);
        let whole = !window.has_more();
        let bytes = &window.bytes[offset..];
        // Made once for all that is there: it costs as much as an instruction.
        let mut decoder = Decoder::with_ip(64, bytes, 0, cpu.features.decoder_options());
        let mut instruction = Instruction::default();
        loop {
            let at = decoder.position();
            let rest = &bytes[at..];
            if rest.len() < MAX_LENGTH && !whole {
                offset += at;
                break;
            }
            if rest.is_empty() {
                return;
            }
            // Each looks as if it were at zero: code may be mapped anywhere.
            decoder.set_ip(0);
            decoder.decode_out(&mut instruction);
            let decoded = match decoder.last_error() {
                DecoderError::None => Decoded::Instruction(instruction),
                _ => decode_one(cpu, rest, CodeSize::Bits64),
            };
            let last = !matches!(decoded, Decoded::Instruction(_));
            if !each(cpu, decoded, rest) || last {
                return;
            }
        }
    }
}

/// Decodes up to `most` instructions from `address` to the end of the page, past conditional branches, and hands each to
/// `each`, which tells whether to go on, with the bytes from its first one on, if the host takes them for the same, and with the operation that it
/// becomes; an operation without an instruction raises an exception and is the last.
pub fn decode_run(
    cpu: &mut Cpu,
    address: GuestAddress,
    most: usize,
    mut each: impl FnMut(Option<&Instruction>, Option<&[u8]>, Op) -> bool,
) {
    let mut left = most;
    walk(cpu, address, |cpu, decoded, bytes| {
        left -= 1;
        match decoded {
            Decoded::Instruction(mut instruction) => {
                let code = instruction.code();
                cpu.features.disguise(&mut instruction, bytes);
                let own = (instruction.code() == code).then_some(bytes);
                let op = lower_disguised(cpu, &instruction, bytes);
                // A branch with a 16-bit target (AMD's processors have them in 64-bit code) is the handler's business.
                let passes = instruction.is_jcc_short_or_near()
                    && instruction.op0_kind() == iced_x86::OpKind::NearBranch64;
                let ends = ends_block(&instruction, CodeSize::Bits64) && !passes;
                each(Some(&instruction), own, op) && !ends && left > 0
            }
            Decoded::Bad(op) => each(None, None, op),
            Decoded::Truncated => false,
        }
    });
}

/// Shows `look` up to `most` instructions from `address`, as long as it returns true, they can be decoded, and the page lasts.
/// Their bytes are marked as code.
pub fn peek(cpu: &mut Cpu, address: GuestAddress, most: usize, mut look: impl FnMut(&Instruction) -> bool) {
    let mut left = most;
    walk(cpu, address, |cpu, decoded, bytes| {
        left -= 1;
        let Decoded::Instruction(mut instruction) = decoded else { return false };
        cpu.features.disguise(&mut instruction, bytes);
        look(&instruction) && left > 0
    });
}

/// The instruction of 64-bit code at `linear`, whose first byte is at `address` and whose last is in the next page, with its
/// operation and the physical address of that page. `None` if it is another kind of instruction or cannot be fetched now.
pub fn decode_straddling(
    cpu: &mut Cpu,
    linear: u64,
    address: GuestAddress,
) -> Option<(Instruction, Op, GuestAddress)> {
    let mut window = Window::new(address);
    window.want(cpu, MAX_LENGTH);
    let head = window.bytes.len();
    if head >= MAX_LENGTH || !matches!(decode_one(cpu, &window.bytes, CodeSize::Bits64), Decoded::Truncated) {
        return None;
    }
    let second = translate_fetch(cpu, (linear | 0xfff).wrapping_add(1)).ok()?;
    let mut tail = Window::new(second);
    tail.want(cpu, MAX_LENGTH);
    let mut bytes = window.bytes;
    bytes.extend_from_slice(&tail.bytes[..MAX_LENGTH]);
    match decode_one(cpu, &bytes, CodeSize::Bits64) {
        Decoded::Instruction(mut instruction) => {
            cpu.features.disguise(&mut instruction, &bytes);
            Some((instruction, lower(cpu, &instruction, &bytes), second))
        }
        Decoded::Bad(_) | Decoded::Truncated => None,
    }
}

/// A block of one instruction that straddles a page boundary; `head` is its part in the first page.
fn straddling(cpu: &mut Cpu, linear: u64, key: BlockKey, head: &[u8]) -> Result<Block, Exception> {
    let mask = if cpu.long_mode() { u64::MAX } else { 0xffff_ffff };
    let head = head.to_vec();
    let second = translate_fetch(cpu, (linear | 0xfff).wrapping_add(1) & mask)?;
    let mut tail = Window::new(second);
    tail.want(cpu, MAX_LENGTH);
    let mut bytes = head;
    bytes.extend_from_slice(&tail.bytes[..MAX_LENGTH]);
    let op = match decode_one(cpu, &bytes, key.size) {
        Decoded::Instruction(instruction) => lower(cpu, &instruction, &bytes),
        Decoded::Bad(op) => op,
        Decoded::Truncated => too_long(),
    };
    let length = u32::from(op.length);
    Ok(Block { key, ops: Box::new([op]), length, second_page: Some(second.page()) })
}

enum Decoded {
    Instruction(Instruction),
    /// Raises an exception when executed.
    Bad(Op),
    /// More bytes are needed.
    Truncated,
}

fn decode_one(cpu: &Cpu, bytes: &[u8], size: CodeSize) -> Decoded {
    let window = &bytes[..bytes.len().min(MAX_LENGTH)];
    let mut decoder = Decoder::with_ip(size.bits(), window, 0, cpu.features.decoder_options());
    let instruction = decoder.decode();
    match decoder.last_error() {
        DecoderError::None => Decoded::Instruction(instruction),
        DecoderError::NoMoreBytes if bytes.len() < MAX_LENGTH => Decoded::Truncated,
        DecoderError::NoMoreBytes => Decoded::Bad(too_long()),
        _ if instruction.len() == MAX_LENGTH && runs_on(cpu, &window[..MAX_LENGTH - 1], size) => {
            Decoded::Bad(too_long())
        }
        _ => {
            let mut op = Op::new(&Instruction::default(), undefined);
            op.length = instruction.len().max(1) as u8;
            Decoded::Bad(op)
        }
    }
}

/// Whether `bytes` are too few. The decoder calls an instruction that does not end within fifteen bytes invalid, like
/// any other; it is too long if fourteen are not enough to see what is wrong with it.
fn runs_on(cpu: &Cpu, bytes: &[u8], size: CodeSize) -> bool {
    let mut decoder = Decoder::with_ip(size.bits(), bytes, 0, cpu.features.decoder_options());
    let _ = decoder.decode();
    decoder.last_error() == DecoderError::NoMoreBytes
}

/// An instruction of more than 15 bytes: #GP(0).
fn too_long() -> Op {
    let mut op = Op::new(&Instruction::default(), |_, _| Err(Exception::GP0));
    op.length = MAX_LENGTH as u8;
    op
}

/// Raises #UD.
///
/// # Errors
/// Always.
pub fn undefined(_: &mut Cpu, _: &Op) -> Result<(), Exception> {
    Err(Exception::UD)
}

/// Turns an instruction, decoded from `bytes`, into an operation.
fn lower(cpu: &mut Cpu, instruction: &Instruction, bytes: &[u8]) -> Op {
    let mut instruction = *instruction;
    cpu.features.disguise(&mut instruction, bytes);
    lower_disguised(cpu, &instruction, bytes)
}

/// Likewise, for what the instruction really is on this processor.
fn lower_disguised(cpu: &mut Cpu, instruction: &Instruction, bytes: &[u8]) -> Op {
    if !cpu.features.allows(instruction) {
        return Op::new(instruction, undefined);
    }
    if let Some(op) = vector::ops::lower(cpu, instruction, bytes) {
        return op;
    }
    let mut op = Op::new(instruction, undefined);
    let integer = cpu.handlers.integer(instruction, op.has(prefix::MEMORY));
    op.handler = integer.or_else(|| system::handler(instruction)).unwrap_or(undefined);
    op
}

/// Whether no further instruction may be decoded into the same block: control may go elsewhere, or the instruction
/// changes what decoding, translation or interrupt delivery depends on.
pub fn ends_block(instruction: &Instruction, size: CodeSize) -> bool {
    use Mnemonic as M;
    if instruction.flow_control() != FlowControl::Next {
        return true;
    }
    if instruction.is_string_instruction() && (instruction.has_rep_prefix() || instruction.has_repne_prefix())
    {
        return true;
    }
    match instruction.mnemonic() {
        M::Sti
        | M::Popf
        | M::Popfd
        | M::Popfq
        | M::Hlt
        | M::Mwait
        | M::In
        | M::Out
        | M::Insb
        | M::Insw
        | M::Insd
        | M::Outsb
        | M::Outsw
        | M::Outsd
        | M::Wrmsr
        | M::Invlpg
        | M::Invpcid
        | M::Lmsw
        | M::Clts
        | M::Xsetbv
        | M::Stac
        | M::Clac
        | M::Wbinvd
        | M::Invd
        | M::Serialize
        | M::Cpuid => true,
        M::Pop | M::Mov | M::Lss => touches_ss_or_control(instruction, size),
        _ => instruction.code() == Code::INVALID,
    }
}

fn touches_ss_or_control(instruction: &Instruction, size: CodeSize) -> bool {
    let register = instruction.op0_register();
    let segment = register.is_segment_register();
    // LSS has a general-purpose register as its operand 0.
    instruction.mnemonic() == Mnemonic::Lss
        || register.is_cr()
        || register.is_dr()
        || (segment && (register == iced_x86::Register::SS || size != CodeSize::Bits64))
}
