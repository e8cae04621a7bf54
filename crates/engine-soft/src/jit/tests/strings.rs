//! CMPS, repeated: where it ends, and what is known of it then.

use ringfence_memory::GuestAddress;

use super::*;

/// What is compared: two pages each.
const FIRST: u64 = DATA;
const SECOND: u64 = DATA + 0x2000;
const BYTES: usize = 0x2000;

/// An instruction to be compared with, and how wide its elements are.
struct Form {
    code: Vec<u8>,
    size: u64,
    until_equal: bool,
}

fn forms(narrow: bool) -> Vec<Form> {
    let widths: &[(&[u8], u8, u64)] =
        &[(&[], 0xa6, 1), (&[0x66], 0xa7, 2), (&[], 0xa7, 4), (&[0x48], 0xa7, 8)];
    let mut forms = Vec::new();
    for &(prefix, opcode, size) in widths {
        for until_equal in [false, true].into_iter().filter(|_| !narrow || size < 8) {
            let repeat = if until_equal { 0xf2 } else { 0xf3 };
            let code = [&[repeat], prefix, &[opcode, 0x0f, 0x0b]].concat();
            forms.push(Form { code, size, until_equal });
        }
    }
    forms
}

/// Interpreter and translator.
struct Both {
    machines: [Interpreter; 2],
    jit: Jit,
    narrow: bool,
}

impl Both {
    fn new(narrow: bool) -> Self {
        let mut machines = [machine(), machine()];
        for machine in &mut machines {
            narrow::prepare(&mut machine.cpu, narrow);
        }
        let options = Options { profile: true, exact_flags: true, ..OPTIONS };
        let jit = Jit::new(options, &machines[1].cpu.code).unwrap();
        Self { machines, jit, narrow }
    }

    fn handed(&self) -> u64 {
        let forms = super::super::handed(&self.machines[1].cpu);
        forms.iter().filter(|(form, _)| form.starts_with("Cmps")).map(|(_, count)| count).sum()
    }

    /// Compares `count` elements at offsets in the pages, of which the one number `odd` is unlike the others: whether the handler was
    /// called.
    fn compare(&mut self, form: &Form, at: u64, count: u64, [from, to]: [u64; 2], odd: u64) -> bool {
        let handed = self.handed();
        let fill = |first: bool| {
            let other = first && form.until_equal;
            let mut bytes = vec![if other { 0x80 } else { 0x10 }; BYTES];
            let odd = (if first { from } else { to } + odd * form.size) as usize;
            let part = bytes.get_mut(odd..odd + form.size as usize);
            if let (true, Some(part)) = (first, part) {
                part.fill(if other { 0x10 } else { 0x91 });
            }
            bytes
        };
        let mut ends = Vec::new();
        for (i, m) in self.machines.iter_mut().enumerate() {
            for (at, first) in [(FIRST, true), (SECOND, false)] {
                m.cpu.memory.write_bytes(GuestAddress(at), &fill(first)).unwrap();
            }
            // 32-bit code knows nothing of what is above.
            let above = if self.narrow && count % 2 == 1 { 7 << 32 } else { 0 };
            (m.cpu.regs[1], m.cpu.regs[6], m.cpu.regs[7]) =
                (above | count, above | (FIRST + from), above | (SECOND + to));
            m.cpu.regs[RIP] = at;
            m.cpu.set_rflags(0x897);
            let before = m.cpu.retired;
            let end = if i == 0 {
                (0..1000).find_map(|_| m.run_block(1000).err()).unwrap()
            } else {
                until_fault(m, &mut self.jit)
            };
            ends.push((end, m.cpu.regs.to_vec(), m.cpu.rflags(), m.cpu.retired - before));
        }
        assert_eq!(ends[0], ends[1], "{:x?}, {count:#x} of {from:#x}, {to:#x}, {odd:#x}", form.code);
        self.handed() != handed
    }
}

fn comparisons_end_as_in_the_interpreter(narrow: bool) {
    let mut both = Both::new(narrow);
    let (mut direct, mut page_ends) = (0, 0);
    for (number, form) in forms(narrow).iter().enumerate() {
        let at = CODE + 0x40 * number as u64;
        for machine in &both.machines {
            machine.cpu.memory.write_bytes(GuestAddress(at), &form.code).unwrap();
        }
        for _ in 0..4 {
            both.compare(form, at, 1, [0, 0], 0);
        }
        for count in [0, 1, 2, 9, 0x200, 0x1000, 0x1001, 0xffff_ffff] {
            for offsets in [[0, 0], [0xfe8, 0], [0x18, 0xff0], [0xfff, 3], [5, 0xffc], [0x800, 0x803]] {
                for odd in [0, 1, 2, 7, 0x1ff, 0xffe, 0x1000] {
                    let handed = both.compare(form, at, count, offsets, odd);
                    // Where all that is looked at lies in its page, on each side.
                    let looked_at = count.min(odd + 1);
                    let fits = |offset: u64| offset + looked_at * form.size <= 0x1000;
                    let expected = count != 0 && offsets.into_iter().all(fits);
                    assert_eq!(handed, !expected, "{:x?}, {count:#x}, {offsets:x?}, {odd:#x}", form.code);
                    direct += u64::from(!handed);
                    page_ends += u64::from(handed);
                }
            }
        }
    }
    assert!(direct > 500 && page_ends > 500, "{direct}, {page_ends}");
}

#[test]
fn comparison_of_strings_ends_as_in_the_interpreter() {
    comparisons_end_as_in_the_interpreter(false);
}

#[test]
fn comparison_of_strings_in_32_bit_code_ends_as_in_the_interpreter() {
    comparisons_end_as_in_the_interpreter(true);
}
