//! The envelope of saved state: a name, a version and named fields.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// One section of a saved machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedState {
    /// Which device or part this is, unique in a machine (such as `pit` or `serial.0`).
    pub name: String,
    /// Version of the layout of `fields`; raised whenever its meaning changes.
    pub version: u32,
    /// The state as named fields.
    pub fields: serde_json::Value,
}

/// Why a saved section cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The section belongs to another device.
    #[error("saved state of {found:?} given to {expected:?}")]
    WrongName {
        /// Whose state was wanted.
        expected: String,
        /// Whose state it is.
        found: String,
    },
    /// The section was written by a version that this one does not know.
    #[error("saved state of {name:?} has version {found}, this program reads up to {newest}")]
    TooNew {
        /// Whose state it is.
        name: String,
        /// Its version.
        found: u32,
        /// The newest version known.
        newest: u32,
    },
    /// The fields are not those of the section.
    #[error("saved state of {name:?} does not parse: {source}")]
    Fields {
        /// Whose state it is.
        name: String,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A field has a value the device cannot have.
    #[error("saved state of {name:?} is not valid: {what}")]
    Invalid {
        /// Whose state it is.
        name: String,
        /// What is wrong.
        what: String,
    },
}

impl SavedState {
    /// Packs `fields` under a name and version.
    pub fn pack(name: &str, version: u32, fields: &impl Serialize) -> Self {
        // A device's state is plain data with string keys, which always converts; null would fail to unpack.
        let fields = serde_json::to_value(fields).unwrap_or_default();
        Self { name: name.to_owned(), version, fields }
    }

    /// Unpacks the fields, checking name and version.
    ///
    /// # Errors
    /// [`StateError`] if the section is another's, too new, or does not parse.
    pub fn unpack<T: DeserializeOwned>(&self, name: &str, newest: u32) -> Result<T, StateError> {
        if self.name != name {
            return Err(StateError::WrongName { expected: name.to_owned(), found: self.name.clone() });
        }
        if self.version > newest {
            return Err(StateError::TooNew { name: name.to_owned(), found: self.version, newest });
        }
        T::deserialize(&self.fields).map_err(|source| StateError::Fields { name: name.to_owned(), source })
    }
}

/// A part of the machine whose state can be saved and loaded.
///
/// Callers stop the vCPUs, call [`Stateful::quiesce`] on every part, and then [`Stateful::save`].
pub trait Stateful: Send + Sync {
    /// Brings work in flight (requests, timers about to fire) to a point that `save` can describe.
    fn quiesce(&self);
    /// The state now.
    fn save(&self) -> SavedState;
    /// Loads a state saved before.
    ///
    /// # Errors
    /// [`StateError`]; the part is as it was then.
    fn restore(&self, state: &SavedState) -> Result<(), StateError>;
}
