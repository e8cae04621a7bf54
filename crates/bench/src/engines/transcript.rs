//! What a side prints while it runs the programs, understood line by line.

use std::collections::BTreeMap;

/// One program on one side in one round.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Measured {
    /// Seconds of each run by the side's monotonic clock, the first (cold) one included.
    pub(crate) seconds: Vec<f64>,
    /// Seconds of the host's processors that each run took, where known.
    pub(crate) processor: Vec<f64>,
    /// SHA-256 of the last run's output.
    pub(crate) result: Option<String>,
    /// The first bad exit status.
    pub(crate) status: Option<i32>,
}

/// Everything that a side printed in one round.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Transcript {
    pub(crate) programs: BTreeMap<String, Measured>,
    /// `/sys/devices/system/cpu/vulnerabilities`: file and text.
    pub(crate) vulnerabilities: BTreeMap<String, String>,
    /// The side's own clock at the beginning and the end, in seconds.
    pub(crate) own_clock: [Option<f64>; 2],
    /// The host's clock when the same lines came, in seconds from the start of the side.
    pub(crate) host_clock: [Option<f64>; 2],
    /// Processor seconds of a guest's process when its session began.
    pub(crate) boot_processor: Option<f64>,
    current: Option<String>,
    /// Processor seconds of a guest's process at the line before.
    mark: Option<f64>,
}

impl Transcript {
    /// Takes a line that came `at` seconds after the side was started. `processor` is how many processor seconds a
    /// guest's process has taken so far; without it, what the programs themselves say counts.
    pub(crate) fn line(&mut self, line: &str, at: f64, processor: Option<f64>) {
        // A console ends its lines as typewriters did, and a kernel may have left half a line before.
        let line = line.trim_end();
        let Some((word, rest)) = line.find('@').and_then(|start| line.get(start + 1..)?.split_once(' '))
        else {
            return;
        };
        let since_mark = processor.zip(self.mark).map(|(now, before)| now - before);
        self.mark = processor;
        match word {
            "begin" => {
                (self.own_clock[0], self.host_clock[0]) = (rest.parse().ok(), Some(at));
                self.boot_processor = processor;
            }
            "end" => {
                (self.own_clock[1], self.host_clock[1]) = (rest.parse().ok(), Some(at));
                self.current = None;
            }
            "cpu" => {
                if let Some((name, text)) = rest.split_once(' ') {
                    self.vulnerabilities.insert(name.to_owned(), text.to_owned());
                }
            }
            "program" => {
                self.current = Some(rest.to_owned());
                self.programs.insert(rest.to_owned(), Measured::default());
            }
            "time" | "result" => {
                let current = self.current.as_ref().and_then(|name| self.programs.get_mut(name));
                let Some(measured) = current else { return };
                if word == "result" {
                    measured.result = Some(rest.to_owned());
                    return;
                }
                let mut fields = rest.split(' ');
                let (seconds, status) = (fields.next().map(str::parse), fields.next().map(str::parse::<i32>));
                let (Some(Ok(seconds)), Some(Ok(status))) = (seconds, status) else { return };
                measured.seconds.push(seconds);
                measured.status = measured.status.or((status != 0).then_some(status));
                let mut own = || fields.next()?.parse().ok();
                measured.processor.extend(if processor.is_some() { since_mark } else { own() });
            }
            _ => {}
        }
    }

    /// Did it run to its end?
    pub(crate) fn complete(&self) -> bool {
        self.host_clock[1].is_some()
    }

    /// How long it took by the side's own clock and by the host's, in seconds.
    pub(crate) fn clocks(&self) -> Option<(f64, f64)> {
        let span = |clock: [Option<f64>; 2]| Some(clock[1]? - clock[0]?);
        Some((span(self.own_clock)?, span(self.host_clock)?))
    }

    /// Do the two clocks disagree by more than the moment that a line is on its way? Then the side's times are worth nothing.
    pub(crate) fn clock_is_wrong(&self) -> bool {
        self.clocks().is_some_and(|(own, host)| (own - host).abs() > 0.1 + 0.02 * host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[(&str, f64)]) -> Transcript {
        let mut transcript = Transcript::default();
        for (line, at) in lines {
            transcript.line(line, *at, None);
        }
        transcript
    }

    #[test]
    fn lines_become_times_results_and_clocks() {
        let seen = read(&[
            ("[    0.1] Linux version", 0.1),
            ("@begin 1.00\r", 2.0),
            ("@cpu meltdown Mitigation: PTI", 2.0),
            ("@program sort", 2.0),
            ("@time 0.25 0 0.125", 2.3),
            ("noise @time 0.20 0", 2.5),
            ("@result abc", 2.6),
            ("@program cc", 2.6),
            ("@time 0.5 1", 3.0),
            ("@time x 0", 3.0),
            ("@end 2.05", 3.1),
        ]);
        let sort = &seen.programs["sort"];
        assert_eq!(
            (&sort.seconds[..], sort.result.as_deref(), sort.status),
            (&[0.25, 0.2][..], Some("abc"), None)
        );
        assert_eq!(sort.processor, [0.125]);
        assert_eq!((seen.programs["cc"].seconds.len(), seen.programs["cc"].status), (1, Some(1)));
        assert_eq!(seen.vulnerabilities["meltdown"], "Mitigation: PTI");
        assert!(seen.complete() && !seen.clock_is_wrong());
    }

    #[test]
    fn processor_time_of_a_guest_is_what_its_process_took_between_lines() {
        let mut seen = Transcript::default();
        let lines = [
            ("@begin 1", 3.0),
            ("@program x", 3.5),
            ("@time 9 0 9", 4.0),
            ("@time 9 0 9", 6.0),
            ("@result r", 7.0),
        ];
        for (line, processor) in lines {
            seen.line(line, 0.0, Some(processor));
        }
        assert_eq!((&seen.programs["x"].processor[..], seen.boot_processor), (&[0.5, 2.0][..], Some(3.0)));
    }

    #[test]
    fn clock_that_runs_at_another_speed_is_noticed() {
        assert!(read(&[("@begin 0", 0.0), ("@end 10", 20.0)]).clock_is_wrong());
        assert!(!read(&[("@begin 0", 0.0), ("@end 10", 10.2)]).clock_is_wrong());
        let cut = read(&[("@begin 0", 0.0), ("@program x", 1.0)]);
        assert!(!cut.complete() && !cut.clock_is_wrong() && cut.programs["x"].seconds.is_empty());
    }
}
