//! Loads random BPF programs, runs and unloads them, and compares each result with what the program should give:
//! `bpf SEED COUNT`. The kernel's own compiler makes code of each, in pages that others had before. Prints how many programs
//! were loaded, how many of them the kernel compiled, and a digest of the results; or why this kernel has no BPF.
//!
//! Built on its own as a static program. Formats: linux/bpf.h and linux/filter.h.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

unsafe extern "C" {
    fn syscall(number: i64, ...) -> i64;
    fn setsockopt(fd: i32, level: i32, name: i32, value: *const u8, len: u32) -> i32;
}

const SYS_BPF: i64 = 321;
const PROG_LOAD: u32 = 5;
const PROG_TEST_RUN: u32 = 10;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const SOCKET_FILTER: u32 = 1;
const SOL_SOCKET: i32 = 1;
const SO_ATTACH_FILTER: i32 = 26;
const ETHERNET_HEADER: usize = 14;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 ^ self.0 >> 29
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 33) as usize % limit
    }
}

fn digest(hash: u64, word: u64) -> u64 {
    (hash ^ word).wrapping_mul(0x100_0000_01b3).rotate_left(17)
}

/// struct bpf_insn.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: from << 4 | to, offset, immediate }
}

/// The bpf system call with these words of its union of attributes.
fn bpf(command: u32, words: &mut [u64; 16]) -> std::io::Result<i64> {
    // SAFETY: the kernel reads and writes the words, and what the callers' pointers among them say.
    let result = unsafe { syscall(SYS_BPF, u64::from(command), words.as_mut_ptr(), size_of_val(words)) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
}

/// Registers r0 and r2 to r5 compute; r6 is the packet.
const COMPUTING: [u8; 5] = [0, 2, 3, 4, 5];

/// A program over five words of a packet: arithmetic of both sizes and branches forward.
fn program(random: &mut Random, len: usize) -> Vec<Instruction> {
    // mov r6, r1
    let mut code = vec![instruction(0xbf, 6, 1, 0, 0)];
    // A load of the packet goes to r0 and destroys r1 to r5, so the words are kept on the stack in between.
    for (at, _) in (0..).zip(COMPUTING) {
        code.push(instruction(0x20, 0, 0, 0, at * 4));
        // stx dw [r10 - 8 * (at + 1)], r0
        code.push(instruction(0x7b, 10, 0, -8 * (at as i16 + 1), 0));
    }
    for (at, register) in (1..).zip(COMPUTING) {
        code.push(instruction(0x79, register, 10, -8 * at, 0));
    }
    for left in (0..len).rev() {
        let (to, from) = (COMPUTING[random.below(5)], COMPUTING[random.below(5)]);
        let number = random.next() as i32;
        let class = [0x07, 0x04][random.below(2)];
        code.push(match random.below(12) {
            // add, sub, or, and, xor with a constant; add, sub, mul, xor with a register
            kind @ 0..=4 => instruction(class | [0x00, 0x10, 0x40, 0x50, 0xa0][kind], to, 0, 0, number),
            kind @ 5..=8 => instruction(class | 0x08 | [0x00, 0x10, 0x20, 0xa0][kind - 5], to, from, 0, 0),
            // lsh, rsh, arsh
            9 => instruction(class | [0x60, 0x70, 0xc0][random.below(3)], to, 0, 0, number & 31),
            // mov
            10 => instruction(class | 0xb8, to, from, 0, 0),
            // jgt, jslt or jset over what is left, or a part of it
            _ => instruction(0x05 | [0x20, 0xc0, 0x40][random.below(3)], to, 0, random.below(left + 1) as i16, number),
        });
    }
    code.push(instruction(0x95, 0, 0, 0, 0));
    code
}

/// What the program gives for a packet's data.
fn interpret(code: &[Instruction], data: &[u8]) -> u32 {
    let mut registers = [0_u64; 11];
    let mut stack = [0_u64; 5];
    let mut at = 0;
    loop {
        let Instruction { code: op, registers: pair, offset, immediate } = code[at];
        let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
        at += 1;
        let slot = || (-offset / 8 - 1) as usize;
        match op {
            0x20 => {
                let bytes = &data[immediate as usize..][..4];
                registers[0] = u64::from(u32::from_be_bytes(bytes.try_into().expect("four")));
            }
            0x7b => stack[slot()] = registers[from],
            0x79 => registers[to] = stack[slot()],
            0x95 => return registers[0] as u32,
            _ if op & 7 == 5 => {
                let (value, number) = (registers[to], immediate as i64 as u64);
                let taken = match op & 0xf0 {
                    0x20 => value > number,
                    0xc0 => (value as i64) < number as i64,
                    _ => value & number != 0,
                };
                at += if taken { offset as usize } else { 0 };
            }
            _ => {
                let wide = op & 7 == 7;
                let cut = |value: u64| if wide { value } else { u64::from(value as u32) };
                let operand = cut(if op & 8 != 0 { registers[from] } else { immediate as i64 as u64 });
                let value = cut(registers[to]);
                registers[to] = cut(match op & 0xf0 {
                    0x00 => value.wrapping_add(operand),
                    0x10 => value.wrapping_sub(operand),
                    0x20 => value.wrapping_mul(operand),
                    0x40 => value | operand,
                    0x50 => value & operand,
                    0x60 => value << operand,
                    0x70 => value >> operand,
                    0xa0 => value ^ operand,
                    0xb0 => operand,
                    _ if wide => (value as i64 >> operand) as u64,
                    _ => (value as i32 >> operand) as u32 as u64,
                });
            }
        }
    }
}

struct Program(OwnedFd);

impl Program {
    fn load(code: &[Instruction]) -> std::io::Result<Self> {
        let mut words = [0; 16];
        words[0] = u64::from(SOCKET_FILTER) | (code.len() as u64) << 32;
        words[1] = code.as_ptr() as u64;
        words[2] = c"Dual MIT/GPL".as_ptr() as u64;
        let fd = bpf(PROG_LOAD, &mut words)?;
        // SAFETY: a descriptor that the kernel just gave.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// Runs it some times over a packet.
    fn run(&self, packet: &[u8], times: u32) -> std::io::Result<u32> {
        let mut words = [0; 16];
        words[0] = self.0.as_raw_fd() as u64;
        words[1] = packet.len() as u64;
        words[2] = packet.as_ptr() as u64;
        words[4] = u64::from(times);
        bpf(PROG_TEST_RUN, &mut words)?;
        Ok((words[0] >> 32) as u32)
    }

    /// Whether the kernel made code of it.
    fn compiled(&self) -> bool {
        // struct bpf_prog_info begins with type, id, an eight-byte tag, and the length of the code.
        let mut info = [0_u32; 64];
        let mut words = [0; 16];
        words[0] = self.0.as_raw_fd() as u64 | (size_of_val(&info) as u64) << 32;
        words[1] = info.as_mut_ptr() as u64;
        bpf(OBJ_GET_INFO_BY_FD, &mut words).expect("the kernel tells");
        info[4] > 0
    }
}

/// A filter of the old kind on a socket: what it returns is how much of a packet comes through.
fn classic(random: &mut Random) -> u64 {
    let (to, from) = UnixDatagram::pair().expect("sockets");
    let mut packet = [0_u8; 96];
    packet.fill_with(|| random.next() as u8);
    let (at, factor, addend) = (random.below(90) as u32, random.next() as u32, random.next() as u32);
    // ld [at]; mul #factor; add #addend; rsh #9; and #63; add #1; ret a
    let code: [(u16, u32); 7] = [(0x20, at), (0x24, factor), (0x04, addend), (0x74, 9), (0x54, 63), (0x04, 1), (0x16, 0)];
    // struct sock_filter and struct sock_fprog.
    let code = code.map(|(code, k)| u64::from(code) | u64::from(k) << 32);
    let filter = [code.len() as u64, code.as_ptr() as u64];
    // SAFETY: the kernel reads the filter.
    let attached =
        unsafe { setsockopt(from.as_raw_fd(), SOL_SOCKET, SO_ATTACH_FILTER, filter.as_ptr().cast(), 16) };
    assert_eq!(attached, 0, "{}", std::io::Error::last_os_error());
    let word = u32::from_be_bytes(packet[at as usize..][..4].try_into().expect("four"));
    let expected = (word.wrapping_mul(factor).wrapping_add(addend) >> 9 & 63) as usize + 1;
    for _ in 0..1 + random.below(6) {
        to.send(&packet).expect("sent");
        let mut got = [0; 96];
        assert_eq!(from.recv(&mut got).expect("received"), expected, "{at} {factor:#x} {addend:#x}");
        assert_eq!(got[..expected], packet[..expected]);
    }
    expected as u64
}

fn main() {
    let mut numbers = std::env::args().skip(1).map(|word| word.parse::<u64>().expect("SEED COUNT"));
    let mut random = Random(numbers.next().expect("SEED COUNT"));
    let count = numbers.next().expect("SEED COUNT");
    let (mut compiled, mut hash) = (0, 0);
    let mut kept: Vec<(Program, Vec<Instruction>)> = Vec::new();
    for number in 0..count {
        let len = 4 + random.below(60);
        let code = program(&mut random, len);
        let program = match Program::load(&code) {
            Err(error) if number == 0 => return println!("none: {error}"),
            program => program.unwrap_or_else(|error| panic!("{error}: {code:x?}")),
        };
        compiled += u64::from(program.compiled());
        kept.push((program, code));
        // Now and then an older one, whose neighbours have come and gone.
        for pick in [kept.len() - 1, random.below(kept.len())] {
            let (program, code) = &kept[pick];
            let mut packet = [0_u8; 64];
            packet.fill_with(|| random.next() as u8);
            let expected = interpret(code, &packet[ETHERNET_HEADER..]);
            let times = [1, 3, 30, 100][random.below(4)];
            let found = program.run(&packet, times).expect("it runs");
            assert_eq!(found, expected, "program {number}: {code:x?} of {packet:x?}");
            hash = digest(hash, u64::from(found));
        }
        if kept.len() > 20 {
            kept.swap_remove(random.below(20));
        }
        hash = digest(hash, classic(&mut random));
    }
    println!("{count} {compiled} {hash:016x}");
}
