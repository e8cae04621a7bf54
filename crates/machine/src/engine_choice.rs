//! Which engine executes the guest.

use std::fmt;
use std::str::FromStr;

use ringfence_engine::{Engine, EngineError};
use ringfence_engine_soft::engine::{InterpreterEngine, JitEngine};
use ringfence_engine_soft::jit::{JitError, Options};
use ringfence_engine_soft::lockstep::{LockstepEngine, LockstepOptions};

/// An engine as named on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum EngineChoice {
    /// The fastest that works on this host.
    #[default]
    Auto,
    /// The host's virtualization.
    Kvm,
    /// The translator of the software engine.
    Jit,
    /// The reference interpreter of the software engine.
    Interp,
    /// Translator and interpreter side by side, compared.
    Lockstep,
}

impl EngineChoice {
    /// Every choice with its name.
    pub const ALL: [(&'static str, Self); 5] = [
        ("auto", Self::Auto),
        ("kvm", Self::Kvm),
        ("jit", Self::Jit),
        ("interp", Self::Interp),
        ("lockstep", Self::Lockstep),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, choice)| *choice == self).map_or("", |(name, _)| name)
    }
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// An engine that nobody knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no engine {0:?}; choose auto, kvm, jit, interp or lockstep")]
pub struct UnknownEngine(pub String);

impl FromStr for EngineChoice {
    type Err = UnknownEngine;

    fn from_str(text: &str) -> Result<Self, UnknownEngine> {
        let found = Self::ALL.iter().find(|(name, _)| *name == text);
        found.map(|(_, choice)| *choice).ok_or_else(|| UnknownEngine(text.to_owned()))
    }
}

/// What a choice came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection {
    /// The engine: never [`EngineChoice::Auto`].
    pub engine: EngineChoice,
    /// Why this one.
    pub reason: &'static str,
}

/// The engine that a choice stands for on this host.
///
/// # Errors
/// [`NotOffered`] if this version does not have it.
pub(crate) fn select(choice: EngineChoice) -> Result<Selection, NotOffered> {
    match choice {
        EngineChoice::Auto => Ok(match ringfence_engine_soft::jit::check_host() {
            Ok(()) => Selection { engine: EngineChoice::Jit, reason: "the fastest engine of this version" },
            Err(JitError::NoLahf) => Selection {
                engine: EngineChoice::Interp,
                reason: "the host's processor lacks LAHF in 64-bit mode, which the translator needs",
            },
            Err(JitError::Memory(_)) => Selection {
                engine: EngineChoice::Interp,
                reason: "the host refuses executable memory files, which the translator needs; much slower",
            },
        }),
        EngineChoice::Interp | EngineChoice::Jit | EngineChoice::Lockstep => {
            Ok(Selection { engine: choice, reason: "asked for by --engine" })
        }
        EngineChoice::Kvm => Err(NotOffered(choice)),
    }
}

/// What engines may be told beyond the machine.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct EngineSettings {
    /// For lock-step: instructions between two comparisons.
    pub(crate) lockstep_batch: Option<u64>,
    /// For the translator: most bytes of translated code, checked; `None` is the default.
    pub(crate) code_memory: Option<u64>,
    /// For the translator: find out where the guest's instructions are.
    pub(crate) profile: bool,
}

/// The engine that was selected.
///
/// # Errors
/// [`EngineError::Unsupported`] if this version does not have it; [`select`] would not have chosen it.
pub(crate) fn make(selection: Selection, settings: EngineSettings) -> Result<Box<dyn Engine>, EngineError> {
    let sized = |options: Options| match settings.code_memory.map(usize::try_from) {
        Some(Ok(code_size)) => Options { code_size, ..options },
        _ => options,
    };
    match selection.engine {
        EngineChoice::Interp => Ok(Box::new(InterpreterEngine)),
        EngineChoice::Jit => Ok(Box::new(JitEngine {
            options: Options { profile: settings.profile, ..sized(Options::default()) },
        })),
        EngineChoice::Lockstep => {
            let default = LockstepOptions::default();
            let options =
                LockstepOptions { batch: settings.lockstep_batch, jit: sized(default.jit), ..default };
            Ok(Box::new(LockstepEngine { options }))
        }
        other => Err(EngineError::Unsupported { engine: other.name(), what: "anything yet".to_owned() }),
    }
}

/// An engine that this version does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the {0} engine is not in this version; use --engine interp, or leave the option out")]
pub struct NotOffered(pub EngineChoice);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for (name, choice) in EngineChoice::ALL {
            assert_eq!(name.parse(), Ok(choice));
            assert_eq!(choice.to_string(), name);
        }
        assert!("tcg".parse::<EngineChoice>().is_err());
    }

    #[test]
    fn auto_becomes_a_real_engine() {
        assert_ne!(select(EngineChoice::Auto).unwrap().engine, EngineChoice::Auto);
        assert_eq!(select(EngineChoice::Kvm), Err(NotOffered(EngineChoice::Kvm)));
        assert_eq!(select(EngineChoice::Lockstep).unwrap().engine, EngineChoice::Lockstep);
    }
}
