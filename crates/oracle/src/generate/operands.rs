//! Gives an instruction operands that make sense to it.

use iced_x86::{FlowControl, Instruction, MemorySize, Mnemonic, OpKind, Register};

use super::address;
use super::encode::Encoded;
use crate::case::{Case, Mode};
use crate::layout::{self, CODE, CODE_LEN, DATA, PAGE, selector};
use crate::random::Random;
use crate::values;

/// Selectors that an instruction may try to load: null, every descriptor of ours, those beyond the table.
const SELECTORS: [u16; 18] = [
    0,
    1,
    3,
    selector::SYSTEM_DATA,
    selector::SYSTEM_DATA & !3,
    selector::CODE32,
    selector::CODE16,
    selector::DATA32,
    selector::DATA16,
    selector::DATA16 & !3 | 4,
    selector::SHORT,
    selector::READ_ONLY,
    selector::EXPAND_DOWN,
    selector::EXECUTE_ONLY,
    selector::NOT_PRESENT,
    selector::EXPAND_DOWN16,
    0x5f,
    0xffff,
];

/// Sets registers, memory, displacements and branch targets of `encoded` for one case.
pub(crate) fn arrange(random: &mut Random, case: &mut Case, encoded: &mut Encoded) {
    let instruction = encoded.instruction;
    if random.chance(85) {
        stack(random, case, &instruction);
    }
    special_registers(random, case, &instruction);
    address::aim_implicit(random, case, &instruction);
    let explicit = (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory);
    let mut operand = None;
    if explicit {
        let size = instruction.memory_size().size() as u64;
        let target = address::target(random, size, case.mode());
        if !random.chance(2) {
            address::aim(random, case, encoded, target);
        }
        operand = Some(target);
    }
    branch(random, case, encoded, operand);
    if let Some(target) = operand {
        memory_content(random, case, &instruction, target);
    }
}

/// Points the stack at memory, with something to pop that suits the instruction.
fn stack(random: &mut Random, case: &mut Case, instruction: &Instruction) {
    let width = u64::from(case.mode().bits() / 8);
    let target = match random.below(20) {
        0..16 => DATA[random.pick(&[0, 1, 3])].address + 0x200 + random.below(0x1c0) * 8,
        16 => address::target(random, width, case.mode()),
        17 => DATA[random.below(4) as usize].address - 8 + random.below(24),
        18 => DATA[0].address + PAGE - random.below(32),
        _ => DATA[random.below(4) as usize].address + random.below(PAGE),
    };
    case.gpr[4] = address::offset_in(case, Register::SS, target);
    if case.mode() != Mode::Bits64 && random.chance(50) {
        // Beyond a 16-bit stack pointer.
        case.gpr[4] |= values::integer(random) << 32;
    }
    if random.chance(70) {
        let frame = DATA[1].address + random.below(0xf00);
        case.gpr[5] = address::offset_in(case, Register::SS, frame);
    }
    let word = match instruction.mnemonic() {
        Mnemonic::Ret => code_pointer(random, case),
        Mnemonic::Pop => {
            if (0..instruction.op_count()).any(|i| instruction.op_register(i).is_segment_register()) {
                u64::from(random.pick(&SELECTORS)) | random.bits() << 16
            } else {
                values::integer(random)
            }
        }
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => {
            random.bits() & if random.chance(80) { !0x100 } else { !0 }
        }
        _ => return,
    };
    case.patch(target, &word.to_le_bytes());
}

fn special_registers(random: &mut Random, case: &mut Case, instruction: &Instruction) {
    use Mnemonic as M;
    let uses = |register: Register| {
        (0..instruction.op_count())
            .any(|i| instruction.op_kind(i) == OpKind::Register && instruction.op_register(i) == register)
    };
    match instruction.mnemonic() {
        M::Div | M::Idiv if random.chance(65) => {
            // A quotient that fits: the high half small or the sign.
            let shift = random.below(64);
            case.gpr[0] = random.bits() >> shift;
            case.gpr[2] = if instruction.mnemonic() == M::Idiv && random.chance(50) { u64::MAX } else { 0 };
        }
        M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz if random.chance(60) => {
            case.gpr[1] = random.below(3) | random.pick(&[0, 0, 1 << 16, 1 << 32]);
        }
        M::Xlatb => {
            let target = address::target(random, 1, case.mode());
            let al = case.gpr[0] & 0xff;
            case.gpr[3] = address::offset_in(case, instruction.memory_segment(), target).wrapping_sub(al);
        }
        M::Bt | M::Bts | M::Btr | M::Btc
            if instruction.op1_kind() == OpKind::Register && random.chance(70) =>
        {
            let bit = random.below(4096).wrapping_sub(2048);
            address::set_register(case, instruction.op1_register(), bit);
        }
        M::Lar | M::Lsl | M::Verr | M::Verw | M::Mov => {
            let selector = u64::from(random.pick(&SELECTORS));
            let loads = instruction.mnemonic() != M::Mov || instruction.op0_register().is_segment_register();
            let last = instruction.op_count() - 1;
            if loads && instruction.op_kind(last) == OpKind::Register {
                address::set_register(case, instruction.op_register(last), selector);
            }
        }
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => {}
        _ => {}
    }
    if uses(Register::CL) && random.chance(75) {
        case.gpr[1] = case.gpr[1] & !0xff | random.below(72);
    }
    if instruction.is_string_instruction() && (instruction.has_rep_prefix() || instruction.has_repne_prefix())
    {
        let count = match random.below(10) {
            0 => 0,
            1..8 => random.below(24),
            8 => random.below(600),
            _ => case.gpr[1] | 0x1_0000,
        };
        case.gpr[1] = if random.chance(25) { count | random.bits() << 32 } else { count };
    }
}

/// An address to branch to: in the code pages but not in the case's own bytes, where it could go round forever, or
/// somewhere that faults.
fn code_pointer(random: &mut Random, case: &Case) -> u64 {
    let linear = match random.below(20) {
        0 => DATA[random.below(4) as usize].address + random.below(PAGE),
        1 => CODE + CODE_LEN as u64 + random.below(PAGE),
        2 if case.mode() == Mode::Bits64 => random.bits(),
        3 => values::integer(random),
        _ => {
            let start = u64::from(case.code_offset);
            let offset = random.below(CODE_LEN as u64);
            let own = start..start + 32;
            CODE + if own.contains(&offset) { (start + 64) % CODE_LEN as u64 } else { offset }
        }
    };
    case.offset_of(linear)
}

fn branch(random: &mut Random, case: &mut Case, encoded: &mut Encoded, operand: Option<u64>) {
    let instruction = encoded.instruction;
    let near =
        matches!(instruction.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
            && instruction.op_count() == 1;
    if near && encoded.offsets.has_immediate() {
        let size = encoded.offsets.immediate_size();
        let next = instruction.next_ip();
        let target = match size {
            1 if random.chance(50) => next.wrapping_add(random.below(0x80)),
            1 => instruction.ip().wrapping_sub(random.below(0x70) + 1),
            _ => code_pointer(random, case),
        };
        encoded.bytes.set(encoded.offsets.immediate_offset(), size, target.wrapping_sub(next));
    }
    if matches!(instruction.flow_control(), FlowControl::IndirectBranch | FlowControl::IndirectCall) {
        let pointer = code_pointer(random, case);
        match operand {
            Some(target) => case.patch(target, &pointer.to_le_bytes()),
            None => address::set_register(case, instruction.op0_register(), pointer),
        }
    }
}

/// Puts a value of the right kind where the memory operand is, in part of the cases.
fn memory_content(random: &mut Random, case: &mut Case, instruction: &Instruction, target: u64) {
    use MemorySize as S;
    use Mnemonic as M;
    let size = instruction.memory_size();
    match instruction.mnemonic() {
        M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b if random.chance(50) => {
            let half = if instruction.mnemonic() == M::Cmpxchg8b { 4 } else { 8 };
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&case.gpr[0].to_le_bytes());
            bytes[half..half + 8].copy_from_slice(&case.gpr[2].to_le_bytes());
            return case.patch(target, &bytes[..size.size().min(16)]);
        }
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => {
            let mut bytes = random.bits().to_le_bytes().repeat(2);
            let at = size.size().saturating_sub(2);
            let selector = random.pick(&SELECTORS).to_le_bytes();
            bytes[at..at + 2].copy_from_slice(&selector);
            if at == 8 {
                // AMD's processors do not know the form with a 64-bit offset and take it for the 32-bit one.
                bytes[4..6].copy_from_slice(&selector);
            }
            return case.patch(target, &bytes[..size.size().min(16)]);
        }
        M::Mov if instruction.op0_register().is_segment_register() => {
            return case.patch(target, &random.pick(&SELECTORS).to_le_bytes());
        }
        M::Lar | M::Lsl | M::Verr | M::Verw => {
            return case.patch(target, &random.pick(&SELECTORS).to_le_bytes());
        }
        M::Fxrstor | M::Fxrstor64 => {
            if layout::data_offset(target).is_some() && random.chance(85) {
                let mxcsr: u32 =
                    if random.chance(90) { random.bits() as u32 & 0xffff } else { random.bits() as u32 };
                case.patch(target + 24, &mxcsr.to_le_bytes());
            }
            return;
        }
        M::Ldmxcsr | M::Vldmxcsr if random.chance(85) => {
            return case.patch(target, &(random.bits() as u32 & 0xffff).to_le_bytes());
        }
        _ => {}
    }
    if instruction.flow_control() != FlowControl::Next || !random.chance(45) {
        return;
    }
    let mut bytes = [0; 64];
    let element: fn(&mut Random) -> u64 = match size.element_type() {
        S::Float32 => values::singles,
        S::Float64 => values::double,
        S::Float16 | S::BFloat16 => values::halves,
        S::Float80 | S::Bcd => {
            bytes[..16].copy_from_slice(&values::extended(random).to_le_bytes());
            return case.patch(target, &bytes[..10]);
        }
        _ => values::integer,
    };
    bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&element(random).to_le_bytes()));
    case.patch(target, &bytes[..size.size().clamp(1, 64)]);
}
