//! Whole instructions through the interpreter: operand access, faults, enabling.

use std::sync::Arc;

use iced_x86::{Code, Instruction, OpKind};
use ringfence_engine::{Bus, ClockMode, VirtualClock};
use ringfence_memory::{GuestAddress, GuestMemory};
use ringfence_x86::cpuid::CpuidTable;
use ringfence_x86::segment::attribute;
use ringfence_x86::{Cr0, Cr4, Efer, Exception, Vector as Number};

use super::forms::{Buffer, difference, load, random_state};
use super::generate::{Random, instance, text};
use super::native::Native;
use crate::code::CodeMap;
use crate::interp::cpu::{Connections, Cpu};
use crate::interp::op::RIP;
use crate::interp::run::Interpreter;
use crate::status::Status;
use crate::vector::call::host_cpuid;
use crate::vector::features::FeatureSet;
use crate::vector::table::{self, Special};

struct NoDevices;

impl Bus for NoDevices {
    fn port_read(&self, _: u16, _: &mut [u8]) {}
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn memory_read(&self, _: GuestAddress, into: &mut [u8]) {
        into.fill(0xff);
    }
    fn memory_write(&self, _: GuestAddress, _: &[u8]) {}
}

/// Where the code is, and the data.
const CODE: u64 = 0x1000;
const DATA: u64 = 0x2_0000;

/// What the host's CPUID says of the leaves that matter here.
fn host_table() -> CpuidTable {
    let mut table = CpuidTable::default();
    let top = host_cpuid(0, 0).eax;
    for (leaf, subleaves) in [(0, 1), (1, 1), (7, 2), (0xd, 16), (0x8000_0000, 1), (0x8000_0001, 1)] {
        for subleaf in 0..subleaves {
            if leaf <= top || leaf >= 0x8000_0000 {
                table.set(leaf, subleaf, host_cpuid(leaf, subleaf));
            }
        }
    }
    table
}

/// 64-bit mode without paging, everything enabled.
fn machine(table: CpuidTable) -> Interpreter {
    let memory = Arc::new(GuestMemory::flat(1 << 20).expect("guest memory"));
    let mut cpu = Cpu::new(Connections {
        code: CodeMap::new(Arc::clone(&memory)),
        memory,
        bus: Arc::new(NoDevices),
        clock: Arc::new(VirtualClock::new(ClockMode::Counted, 0)),
        cpuid: Arc::new(table),
    })
    .expect("a vCPU");
    cpu.efer = Efer::LME | Efer::LMA;
    cpu.cr0 = Cr0::PE | Cr0::ET | Cr0::NE | Cr0::MP;
    cpu.cr4 = Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE;
    cpu.segments[1].attributes |= attribute::LONG;
    cpu.segments[1].base = 0;
    cpu.update_mode();
    let all = cpu.vector.xsave_layout().supported();
    assert!(cpu.vector.set_xcr0(all));
    Interpreter::new(cpu)
}

/// Executes one instruction.
fn step(machine: &mut Interpreter, code: &[u8]) -> Result<(), Exception> {
    machine.blocks.clear();
    let mut padded = code.to_vec();
    padded.resize(16, 0x90);
    machine.cpu.memory.write_bytes(GuestAddress(CODE), &padded).expect("memory");
    machine.cpu.regs[RIP] = CODE;
    let result = machine.step();
    machine.cpu.vector.unit.park();
    result
}

fn outcome(machine: &mut Interpreter, code: &[u8]) -> Option<Number> {
    step(machine, code).err().map(|exception| exception.vector)
}

#[test]
fn interpreted_forms_do_what_the_host_does() {
    let seed = 0x5eed_0007;
    let mut random = Random::new(seed);
    let native = Native::new(FeatureSet::host().contains(iced_x86::CpuidFeature::AVX512F));
    let mut machine = machine(host_table());
    let offered = FeatureSet::from_cpuid(host_cpuid);
    let (mut forms, mut all, mut cases) = (0, 0, 0);
    let mut failures = Vec::new();
    let mut missed = Vec::new();
    for code in Code::values() {
        let mut probe = Instruction::default();
        probe.set_code(code);
        let op_code = code.op_code();
        let tested = match table::special(&probe) {
            None => table::concerns(&probe),
            // Maskmov goes to DS:RDI and the state images have tests of their own.
            Some(kind) => matches!(
                kind,
                Special::Gather
                    | Special::Scatter
                    | Special::ZeroAll
                    | Special::ZeroUpper
                    | Special::StoreStatusAx
            ),
        };
        if !op_code.is_instruction()
            || !op_code.mode64()
            || !tested
            || op_code.fwait()
            || !offered.contains_all(code.cpuid_features())
        {
            continue;
        }
        all += 1;
        let mut done = false;
        for _ in 0..8 {
            let Some((instruction, bytes)) = instance(code, &mut random) else { continue };
            let mut state = random_state(&mut random);
            state.gpr[4] = 0x9000;
            let mut buffer = Buffer([0; 24]);
            buffer.0.fill_with(|| random.operand());
            let before: Vec<u8> = buffer.0.iter().flat_map(|word| word.to_le_bytes()).collect();
            let vector_index = instruction.memory_index().is_vector_register();
            if vector_index {
                // Indices that stay in the buffer.
                let index = instruction.memory_index().number();
                let mut small = || (i64::from(random.below(8)) - 3) as u64;
                let wide = op_code.instruction_string().contains("vm64");
                state.zmm[index] =
                    std::array::from_fn(
                        |_| {
                            if wide { small() } else { small() & 0xffff_ffff | small() << 32 }
                        },
                    );
            }
            let offset = match instruction.memory_size().size() {
                _ if vector_index => 80,
                size if size >= 16 => 64,
                _ => 32 + u64::from(random.below(64)),
            };
            let displacement = instruction.memory_displacement64();
            let host_base =
                (buffer.0.as_ptr() as u64 + offset).wrapping_sub(if vector_index { 0 } else { displacement });
            let guest_base = (DATA + offset).wrapping_sub(if vector_index { 0 } else { displacement });

            let cpu = &mut machine.cpu;
            cpu.regs[..16].copy_from_slice(&state.gpr);
            cpu.regs[3] = guest_base;
            cpu.status = Status(state.status).canonical();
            cpu.memory.write_bytes(GuestAddress(DATA), &before).expect("memory");
            load(&mut cpu.vector.unit, &state);
            let result = step(&mut machine, &bytes);

            let mut expected = state.clone();
            expected.gpr[3] = host_base;
            native.run(&bytes, &mut expected);
            let host: Vec<u8> = buffer.0.iter().flat_map(|word| word.to_le_bytes()).collect();
            let mut guest = vec![0; host.len()];
            let cpu = &mut machine.cpu;
            cpu.memory.read_bytes(GuestAddress(DATA), &mut guest).expect("memory");
            cases += 1;
            done = true;
            expected.gpr[3] = guest_base;
            state.gpr.copy_from_slice(&cpu.regs[..16]);
            state.status = cpu.status.0;
            let wrong = if let Err(exception) = result {
                Some(format!("{exception:?}"))
            } else if host != guest {
                Some(format!("memory: host {host:x?}, guest {guest:x?}"))
            } else {
                difference(&expected, &mut cpu.vector.unit, &state)
            };
            if let Some(wrong) = wrong {
                failures.push(format!("{code:?} {bytes:02x?} `{}`: {wrong}", text(&instruction)));
                break;
            }
        }
        if done {
            forms += 1;
        } else {
            missed.push(code);
        }
    }
    println!(
        "interpreted vector forms: {forms} of {all}; {cases} cases; seed {seed:#x}; not covered: {missed:?}"
    );
    assert!(failures.is_empty(), "{} forms differ:\n{}", failures.len(), failures.join("\n"));
    assert!(forms * 100 >= all * 98, "{forms} of {all}");
}

#[test]
fn implicit_registers_are_those_of_the_table() {
    let mut factory = iced_x86::InstructionInfoFactory::new();
    let mut random = Random::new(5);
    for code in Code::values() {
        let mut probe = Instruction::default();
        probe.set_code(code);
        if !code.op_code().is_instruction() || !table::concerns(&probe) || table::special(&probe).is_some() {
            continue;
        }
        let Some((instruction, _)) = instance(code, &mut random) else { continue };
        let named = |register: iced_x86::Register| {
            (0..instruction.op_count()).any(|o| {
                instruction.op_kind(o) == OpKind::Register
                    && instruction.op_register(o).full_register() == register
            }) || register == instruction.op_mask()
                || register == iced_x86::Register::RBX
                || register.is_st()
                || register.is_segment_register()
        };
        let listed = table::implicit(instruction.mnemonic());
        for used in factory.info(&instruction).used_registers() {
            let register = used.register().full_register();
            let found = listed.iter().any(|(r, ..)| r.full_register() == register);
            // An MMX instruction uses them all, and so do the registers that alias them.
            assert!(named(register) || found || register.is_mm(), "{code:?} uses {register:?}");
        }
    }
}

#[test]
fn control_registers_gate_each_class() {
    let mut m = machine(host_table());
    let addps = [0x0f, 0x58, 0xc1];
    let paddb_mm = [0x0f, 0xfc, 0xc1];
    let vaddps = [0xc5, 0xf0, 0x58, 0xc1];
    let fld1 = [0xd9, 0xe8];
    let fwait = [0x9b];
    let xsave = [0x0f, 0xae, 0x23];
    m.cpu.regs[3] = DATA;
    assert_eq!(outcome(&mut m, &[0xdb, 0xe3]), None, "fninit");
    let set = |m: &mut Interpreter, cr0: Cr0, cr4: Cr4| {
        m.cpu.cr0 = Cr0::PE | Cr0::ET | Cr0::NE | cr0;
        m.cpu.cr4 = cr4;
        m.cpu.update_mode();
    };
    let usual = Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE;
    let (ud, nm) = (Some(Number::InvalidOpcode), Some(Number::DeviceNotAvailable));
    for (cr0, cr4, expected) in [
        (Cr0::empty(), usual, [None, None, None, None, None, None]),
        (Cr0::TS, usual, [nm, nm, nm, nm, None, nm]),
        (Cr0::TS | Cr0::MP, usual, [nm, nm, nm, nm, nm, nm]),
        (Cr0::EM, usual, [ud, ud, None, nm, None, None]),
        (Cr0::empty(), usual - Cr4::OSFXSR, [ud, None, None, None, None, None]),
        (Cr0::empty(), usual - Cr4::OSXSAVE, [None, None, ud, None, None, ud]),
    ] {
        set(&mut m, cr0, cr4);
        let codes: [&[u8]; 6] = [&addps, &paddb_mm, &vaddps, &fld1, &fwait, &xsave];
        if m.cpu.vector.xsave_layout().supported() & 4 == 0 {
            continue;
        }
        assert_eq!(codes.map(|code| outcome(&mut m, code)), expected, "{cr0:?} {cr4:?}");
    }
    set(&mut m, Cr0::empty(), usual);
    assert!(m.cpu.vector.set_xcr0(3));
    assert_eq!(outcome(&mut m, &vaddps), ud, "XCR0 without AVX");
    assert_eq!(outcome(&mut m, &addps), None);
}

#[test]
fn hidden_extension_is_undefined() {
    let mut table = host_table();
    let mut leaf = table.get(1, 0);
    leaf.ecx &= !(1 << 19);
    table.set(1, 0, leaf);
    let mut m = machine(table);
    // pmulld xmm0, xmm1 is of SSE4.1; pshufb of SSSE3.
    assert_eq!(outcome(&mut m, &[0x66, 0x0f, 0x38, 0x40, 0xc1]), Some(Number::InvalidOpcode));
    assert_eq!(outcome(&mut m, &[0x66, 0x0f, 0x38, 0x00, 0xc1]), None);
    let mut bare = machine_without_vectors();
    assert_eq!(outcome(&mut bare, &[0x0f, 0x58, 0xc1]), Some(Number::InvalidOpcode));
}

fn machine_without_vectors() -> Interpreter {
    let mut table = CpuidTable::default();
    table.set(0, 0, host_cpuid(0, 0));
    let mut m = machine(host_table());
    m.cpu.vector = crate::vector::Vector::new(&table).expect("code memory");
    m.cpu.update_mode();
    m
}

#[test]
fn misaligned_legacy_operand_is_a_general_protection_fault() {
    let mut m = machine(host_table());
    m.cpu.regs[3] = DATA + 8;
    let gp = Some(Number::GeneralProtection);
    for (code, expected) in [
        (&[0x0f, 0x58, 0x03][..], gp),              // addps xmm0, [rbx]
        (&[0x0f, 0x28, 0x03], gp),                  // movaps
        (&[0x0f, 0x29, 0x03], gp),                  // movaps store
        (&[0x0f, 0x10, 0x03], None),                // movups
        (&[0xf2, 0x0f, 0x58, 0x03], None),          // addsd
        (&[0xc5, 0xf0, 0x58, 0x03], None),          // vaddps
        (&[0xc5, 0xf8, 0x28, 0x03], gp),            // vmovaps
        (&[0x66, 0x0f, 0x3a, 0x63, 0x03, 0], None), // pcmpistri
        (&[0x0f, 0xae, 0x03], gp),                  // fxsave
    ] {
        assert_eq!(outcome(&mut m, code), expected, "{code:02x?}");
    }
}

#[test]
fn store_across_memory_end_writes_nothing() {
    let mut m = machine(host_table());
    // Pages: identity-mapped 2 MiB would not fault, so use the limit of a compatibility-mode segment.
    m.cpu.segments[1].attributes &= !attribute::LONG;
    m.cpu.segments[1].attributes |= attribute::DB;
    m.cpu.segments[3].limit = (DATA + 7) as u32;
    m.cpu.update_mode();
    m.cpu.memory.write_bytes(GuestAddress(DATA), &[0xaa; 32]).expect("memory");
    m.cpu.regs[3] = DATA;
    assert_eq!(outcome(&mut m, &[0x0f, 0x11, 0x03]), Some(Number::GeneralProtection));
    let mut bytes = [0; 16];
    m.cpu.memory.read_bytes(GuestAddress(DATA), &mut bytes).expect("memory");
    assert_eq!(bytes, [0xaa; 16]);
}

#[test]
fn masked_elements_do_not_fault() {
    let mut m = machine(host_table());
    if m.cpu.vector.xsave_layout().supported() & 4 == 0 {
        return;
    }
    // Eight elements at the end of the data segment, of which four are inside and selected.
    m.cpu.segments[1].attributes &= !attribute::LONG;
    m.cpu.segments[1].attributes |= attribute::DB;
    m.cpu.segments[3].limit = (DATA + 15) as u32;
    m.cpu.update_mode();
    m.cpu.memory.write_bytes(GuestAddress(DATA), &[0x11; 32]).expect("memory");
    m.cpu.regs[3] = DATA;
    let low = [0x8000_0000_8000_0000, 0x8000_0000_8000_0000, 0, 0, 0, 0, 0, 0];
    m.cpu.vector.unit.registers.zmm[1] = low;
    // All the bits that the host has: what it lacks is zero and stays out of its instructions' reach.
    let words = if FeatureSet::host().contains(iced_x86::CpuidFeature::AVX512F) { 8 } else { 4 };
    m.cpu.vector.unit.registers.zmm[2][..words].fill(u64::MAX);
    // vmaskmovps [rbx], ymm1, ymm2
    assert_eq!(outcome(&mut m, &[0xc4, 0xe2, 0x75, 0x2e, 0x13]), None);
    let mut bytes = [0; 32];
    m.cpu.memory.read_bytes(GuestAddress(DATA), &mut bytes).expect("memory");
    assert_eq!(bytes[..16], [0xff; 16]);
    assert_eq!(bytes[16..], [0x11; 16]);
    // vmaskmovps ymm2, ymm1, [rbx]
    assert_eq!(outcome(&mut m, &[0xc4, 0xe2, 0x75, 0x2c, 0x13]), None);
    assert_eq!(m.cpu.vector.unit.registers.zmm[2], [u64::MAX, u64::MAX, 0, 0, 0, 0, 0, 0]);
    // The fifth element is selected but outside.
    m.cpu.vector.unit.registers.zmm[1][2] = 0x8000_0000;
    assert_eq!(outcome(&mut m, &[0xc4, 0xe2, 0x75, 0x2c, 0x13]), Some(Number::GeneralProtection));
}

#[test]
fn maskmovdqu_stores_selected_bytes() {
    let mut m = machine(host_table());
    m.cpu.memory.write_bytes(GuestAddress(DATA), &[0x11; 16]).expect("memory");
    m.cpu.regs[7] = DATA;
    m.cpu.vector.unit.registers.zmm[0] = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908, 0, 0, 0, 0, 0, 0];
    m.cpu.vector.unit.registers.zmm[1] = [0x8000_0000_0000_8000, 0x0000_0000_0000_0080, 0, 0, 0, 0, 0, 0];
    assert_eq!(outcome(&mut m, &[0x66, 0x0f, 0xf7, 0xc1]), None);
    let mut bytes = [0; 16];
    m.cpu.memory.read_bytes(GuestAddress(DATA), &mut bytes).expect("memory");
    let mut expected = [0x11; 16];
    (expected[1], expected[7], expected[8]) = (1, 7, 8);
    assert_eq!(bytes, expected);
}

#[test]
fn pending_x87_exception_is_raised_by_the_next_waiting_instruction() {
    let mut m = machine(host_table());
    let mf = Some(Number::X87Error);
    // fninit; fldcw [rbx] with division by zero unmasked; fld1; fldz; fdivp
    m.cpu.memory.write_bytes(GuestAddress(DATA), &0x37bu16.to_le_bytes()).expect("memory");
    m.cpu.regs[3] = DATA;
    for code in [&[0xdb, 0xe3][..], &[0xd9, 0x2b], &[0xd9, 0xe8], &[0xd9, 0xee], &[0xde, 0xf9]] {
        assert_eq!(outcome(&mut m, code), None, "{code:02x?}");
    }
    assert_eq!(m.cpu.vector.unit.pointers().fip, CODE);
    assert_eq!(m.cpu.vector.unit.pointers().fop, 0x6f9);
    assert_eq!(outcome(&mut m, &[0xd9, 0xe8]), mf, "fld1");
    assert_eq!(outcome(&mut m, &[0x9b]), mf, "fwait");
    assert_eq!(outcome(&mut m, &[0x0f, 0xfc, 0xc1]), mf, "paddb mm0, mm1");
    assert_eq!(outcome(&mut m, &[0xdf, 0xe0]), None, "fnstsw ax");
    assert_eq!(m.cpu.regs[0] & 0xff, 0x84);
    assert_eq!(outcome(&mut m, &[0xdb, 0xe2]), None, "fnclex");
    assert_eq!(outcome(&mut m, &[0xd9, 0xe8]), None, "fld1");
}

#[test]
fn simd_exception_needs_the_operating_systems_consent() {
    let mut m = machine(host_table());
    m.cpu.vector.unit.registers.zmm[0] = [0x3f80_0000, 0, 0, 0, 0, 0, 0, 0];
    m.cpu.memory.write_bytes(GuestAddress(DATA), &0x1d80u32.to_le_bytes()).expect("memory");
    m.cpu.regs[3] = DATA;
    assert_eq!(outcome(&mut m, &[0x0f, 0xae, 0x13]), None, "ldmxcsr [rbx]");
    // divss xmm0, xmm1
    assert_eq!(outcome(&mut m, &[0xf3, 0x0f, 0x5e, 0xc1]), Some(Number::SimdError));
    assert_eq!(m.cpu.vector.unit.mxcsr(), 0x1d84);
    m.cpu.cr4 -= Cr4::OSXMMEXCPT;
    m.cpu.update_mode();
    assert_eq!(outcome(&mut m, &[0xf3, 0x0f, 0x5e, 0xc1]), Some(Number::InvalidOpcode));
    assert_eq!(m.cpu.vector.unit.registers.zmm[0][0], 0x3f80_0000);
    m.cpu.memory.write_bytes(GuestAddress(DATA), &0x8000_1f80u32.to_le_bytes()).expect("memory");
    assert_eq!(outcome(&mut m, &[0x0f, 0xae, 0x13]), Some(Number::GeneralProtection), "reserved MXCSR bits");
}

#[test]
fn forms_beyond_the_limit_run_all_the_same() {
    let mut m = machine(host_table());
    let avx512 = m.cpu.vector.xsave_layout().supported() & 0x80 != 0;
    if !avx512 {
        return;
    }
    m.cpu.vector.unit.registers.zmm[1] = [0x0003_0002_0001_0000; 8];
    // Forms with an immediate: vpternlogd, vpshufd, … in every encoding, until no more are kept.
    'fill: for opcode in [0x25, 0x03, 0x1e, 0x3f, 0x70, 0x71, 0x72, 0x73, 0x22, 0x43] {
        for (p1, p2) in [(0x75, 0x08), (0x75, 0x28), (0x75, 0x48), (0xf5, 0x08), (0xf5, 0x28), (0xf5, 0x48)] {
            for mask in [0, 1, 0x81] {
                for memory in [0xc1, 0x03] {
                    for imm in 0..=255 {
                        let code = [0x62, 0xf3, p1, p2 | mask, opcode, memory, imm];
                        m.cpu.regs[3] = DATA;
                        let end = outcome(&mut m, &code);
                        assert!(matches!(end, None | Some(Number::InvalidOpcode)), "{code:02x?}: {end:?}");
                        if m.cpu.vector.is_full() {
                            break 'fill;
                        }
                    }
                }
            }
        }
    }
    assert!(m.cpu.vector.is_full(), "the forms above are enough");
    // pshuflw xmm2, xmm1, imm8
    m.cpu.vector.unit.registers.zmm[1] = [0x0003_0002_0001_0000, 5, 0, 0, 0, 0, 0, 0];
    assert_eq!(outcome(&mut m, &[0xf2, 0x0f, 0x70, 0xd1, 0x1b]), None);
    assert_eq!(m.cpu.vector.unit.registers.zmm[2][..2], [0x0000_0001_0002_0003, 5]);
    // fld1; fadd st(0), st(0); fistp dword [rbx]
    for code in [&[0xdb, 0xe3][..], &[0xd9, 0xe8], &[0xd8, 0xc0], &[0xdb, 0x1b]] {
        assert_eq!(outcome(&mut m, code), None, "{code:02x?}");
    }
    let mut bytes = [0; 4];
    m.cpu.memory.read_bytes(GuestAddress(DATA), &mut bytes).expect("memory");
    assert_eq!(bytes, 2u32.to_le_bytes());
}
