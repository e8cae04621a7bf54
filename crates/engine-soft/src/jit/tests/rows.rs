//! Instructions that access memory by turns from a few bases, as sums over arrays do: rows of several bases.

use ringfence_oracle::Random;

use super::generate::POINTERS;

/// Opcodes of instructions with a register and an operand in memory, and their prefixes.
const FORMS: [(&[u8], &[u8]); 16] = [
    (&[], &[0x8b]),                 // mov r,m
    (&[], &[0x89]),                 // mov m,r
    (&[], &[0x03]),                 // add r,m
    (&[], &[0x01]),                 // add m,r
    (&[], &[0x13]),                 // adc r,m
    (&[], &[0x11]),                 // adc m,r
    (&[], &[0x1b]),                 // sbb r,m
    (&[], &[0x3b]),                 // cmp r,m
    (&[], &[0x0f, 0x44]),           // cmove r,m
    (&[], &[0x0f, 0xaf]),           // imul r,m
    (&[], &[0x8b]),                 // mov r,m
    (&[], &[0x89]),                 // mov m,r
    (&[0x66], &[0x0f, 0x38, 0xf6]), // adcx r,m
    (&[0xf3], &[0x0f, 0x38, 0xf6]), // adox r,m
    (&[0x66], &[0x0f, 0x6f]),       // movdqa xmm,m
    (&[0xf3], &[0x0f, 0x7f]),       // movdqu m,xmm
];

/// ModRM, and what follows it, for a register and a distance from a base that is no index.
fn operand(reg: u8, base: u8, displacement: i32) -> Vec<u8> {
    let mut bytes = vec![0x80 | (reg & 7) << 3 | base & 7];
    if base & 7 == 4 {
        bytes.push(0x24);
    }
    bytes.extend(displacement.to_le_bytes());
    bytes
}

/// An instruction that accesses memory at some distance from `base`.
fn access(random: &mut Random, base: u8, reg: u8) -> Vec<u8> {
    let displacement = match random.below(8) {
        0 => random.below(0x800) as i32 - 0x400,
        1 => random.below(0x80) as i32,
        _ => 8 * random.below(16) as i32,
    };
    let tail = operand(reg, base, displacement);
    if random.chance(15) {
        // mulx reg, rcx, m
        let first = (!(reg >> 3) & 1) << 7 | 1 << 6 | (!(base >> 3) & 1) << 5 | 2;
        return [&[0xc4, first, 0xf3, 0xf6][..], &tail].concat();
    }
    let (prefix, opcode) = random.pick(&FORMS);
    let rex = 0x48 | (reg >> 3) << 2 | base >> 3;
    [prefix, &[rex], opcode, &tail].concat()
}

/// Instructions in a row, mostly accesses from two or three bases by turns.
pub(super) fn row(random: &mut Random) -> Vec<Vec<u8>> {
    let bases: Vec<u8> = (0..2 + random.below(2)).map(|_| random.pick(&POINTERS)).collect();
    let other = |random: &mut Random| random.pick(&[0, 1, 2, 5, 8, 10, 11, 12, 14]);
    (0..4 + random.below(10))
        .map(|_| {
            // Now and then it changes a base.
            let reg = if random.chance(5) { random.pick(&bases) } else { other(random) };
            match random.below(15) {
                0 => vec![0x48 | reg >> 3, 0xff, 0xc0 | reg & 7], // inc reg
                1 => vec![0x40 | reg >> 3, 0x50 | reg & 7],       // push reg
                2 => vec![0x40 | reg >> 3, 0x58 | reg & 7],       // pop reg
                3 => vec![0x48 | ((reg >> 3) * 5), 0x31, 0xc0 | ((reg & 7) * 9)], // xor reg,reg
                4 => {
                    // add or sub base,n
                    let base = random.pick(&bases);
                    let modrm = random.pick(&[0xc0, 0xe8]) | base & 7;
                    vec![0x48 | base >> 3, 0x83, modrm, 8 * random.below(32) as u8]
                }
                5 => {
                    // lea base,[base+n]
                    let base = random.pick(&bases);
                    let tail = operand(base, base, 8 * random.below(32) as i32 - 0x80);
                    [&[0x48 | ((base >> 3) * 5), 0x8d][..], &tail].concat()
                }
                6 => {
                    // add reg,other, of 32 or 64 bits
                    let (a, b) = (other(random), other(random));
                    let rex = random.pick(&[0x40, 0x48]) | (a >> 3) << 2 | b >> 3;
                    vec![rex, 0x01, 0xc0 | (a & 7) << 3 | b & 7]
                }
                _ => {
                    let base = random.pick(&bases);
                    access(random, base, reg)
                }
            }
        })
        .collect()
}
