//! Moments worth knowing, seen in the guest's output.

use std::time::Instant;

/// When the guest first said something, and when it first asked for a command.
#[derive(Clone, Debug, Default)]
pub struct Marks {
    /// First byte of output.
    pub first_output: Option<Instant>,
    /// First shell prompt: `# ` or `$ ` at the end of what was a short line.
    pub prompt: Option<Instant>,
    /// Bytes of output.
    pub bytes: u64,
    /// End of the present line.
    line: Vec<u8>,
}

/// Longer lines are no prompts.
const LONGEST_PROMPT: usize = 80;

impl Marks {
    pub(super) fn observe(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.bytes += bytes.len() as u64;
        self.first_output.get_or_insert_with(Instant::now);
        if self.prompt.is_some() {
            return;
        }
        for &byte in bytes {
            match byte {
                b'\n' | b'\r' => self.line.clear(),
                _ if self.line.len() <= LONGEST_PROMPT => self.line.push(byte),
                _ => {}
            }
            // A line that starts with a bracket is the kernel's.
            let short = self.line.len() <= LONGEST_PROMPT && !self.line.starts_with(b"[");
            if short && (self.line.ends_with(b"# ") || self.line.ends_with(b"$ ")) {
                self.prompt = Some(Instant::now());
                self.line = Vec::new();
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_is_seen_across_writes() {
        let mut marks = Marks::default();
        marks.observe(b"[    0.5] booting\r\n");
        assert!(marks.first_output.is_some() && marks.prompt.is_none());
        for byte in b"root@ringfence:~# " {
            marks.observe(&[*byte]);
        }
        assert!(marks.prompt.is_some());
    }
}
