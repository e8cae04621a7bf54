//! From bytes in guest memory to blocks of operations.

use iced_x86::{Code, Decoder, DecoderError, FlowControl, Instruction, Mnemonic};
use ringfence_memory::GuestAddress;
use ringfence_x86::Exception;

use super::block::{Block, BlockKey};
use super::cpu::{CodeSize, Cpu};
use super::found::{find, marks};
use super::op::{Op, prefix};
use super::system;
use super::window::{Code64, Window};
use crate::mmu::tlb::Page;
use crate::mmu::walk::{Access, Rights, translate};
use crate::vector;

/// Most instructions in a block.
const MAX_BLOCK: usize = 32;
/// Longest instruction in bytes (SDM 2A 2.3.11).
pub(super) const MAX_LENGTH: usize = 15;

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

/// Decodes a block at `linear`, whose first byte is at `address`.
///
/// # Errors
/// #PF if the first instruction runs into a page that cannot be fetched from.
pub fn decode_block(cpu: &mut Cpu, linear: u64, address: GuestAddress) -> Result<Block, Exception> {
    let size = cpu.code_size;
    let key = BlockKey { address, size };
    let mut window = Window::take(cpu);
    window.forget();
    let mut ops = std::mem::take(&mut window.ops);
    ops.clear();
    let mut offset = 0;
    while ops.len() < MAX_BLOCK {
        let code = window.at(cpu, GuestAddress(address.0 + offset));
        let Some((op, ends)) = block_op(cpu, code, size) else { break };
        offset += u64::from(op.length);
        ops.push(op);
        if ends || address.page_offset() + offset >= 0x1000 {
            break;
        }
    }
    let head = if ops.is_empty() { window.at(cpu, address).bytes().to_vec() } else { Vec::new() };
    let block: Box<[Op]> = Box::from(&ops[..]);
    window.ops = ops;
    window.put_back(cpu);
    if block.is_empty() {
        return straddling(cpu, linear, key, head);
    }
    Ok(Block { key, ops: block, length: offset as u32, second_page: None })
}

/// The operation at the start of some bytes, and whether it ends a block; `None` if they are too few.
fn block_op(cpu: &mut Cpu, code: Code64<'_>, size: CodeSize) -> Option<(Op, bool)> {
    let (mut op, mut decoded) = (Op::UNDEFINED, Instruction::default());
    let found = match size {
        CodeSize::Bits64 => find::<false>(cpu, code, &mut decoded, &mut op),
        CodeSize::Bits32 => find::<true>(cpu, code, &mut decoded, &mut op),
        CodeSize::Bits16 => {
            let bytes = code.bytes();
            return match decode_one(cpu, bytes, size) {
                Decoded::Instruction(instruction) => {
                    Some((lower(cpu, &instruction, bytes), ends_block(&instruction, size)))
                }
                Decoded::Bad(op) => Some((op, true)),
                Decoded::Truncated => None,
            };
        }
    };
    let ends = found?.has(marks::ENDS);
    Some((op, ends))
}

/// Bytes at the end of a page, fewer than an instruction can have, and those at the start of another.
pub(super) fn with_tail(cpu: &mut Cpu, head: &[u8], second: GuestAddress) -> [u8; 2 * MAX_LENGTH] {
    let mut window = Window::take(cpu);
    window.forget();
    let mut all = [0; 2 * MAX_LENGTH];
    all[..head.len()].copy_from_slice(head);
    all[head.len()..head.len() + MAX_LENGTH].copy_from_slice(window.at(cpu, second).bytes());
    window.forget();
    window.put_back(cpu);
    all
}

/// A block of one instruction that straddles a page boundary; `head` is its part in the first page.
fn straddling(cpu: &mut Cpu, linear: u64, key: BlockKey, head: Vec<u8>) -> Result<Block, Exception> {
    let mask = if cpu.long_mode() { u64::MAX } else { 0xffff_ffff };
    let second = translate_fetch(cpu, (linear | 0xfff).wrapping_add(1) & mask)?;
    let bytes = with_tail(cpu, &head, second);
    let op = match decode_one(cpu, &bytes, key.size) {
        Decoded::Instruction(instruction) => lower(cpu, &instruction, &bytes),
        Decoded::Bad(op) => op,
        Decoded::Truncated => too_long(),
    };
    let length = u32::from(op.length);
    Ok(Block { key, ops: Box::new([op]), length, second_page: Some(second.page()) })
}

pub(super) enum Decoded {
    Instruction(Instruction),
    /// Raises an exception when executed.
    Bad(Op),
    /// More bytes are needed.
    Truncated,
}

pub(super) fn decode_one(cpu: &Cpu, bytes: &[u8], size: CodeSize) -> Decoded {
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
pub(super) fn lower_disguised(cpu: &mut Cpu, instruction: &Instruction, bytes: &[u8]) -> Op {
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
