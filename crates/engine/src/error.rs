//! What an engine can fail at.

/// An error of an engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The engine cannot do what the description asks.
    #[error("the {engine} engine cannot offer {what}")]
    Unsupported {
        /// Which engine.
        engine: &'static str,
        /// What was asked of it.
        what: String,
    },
    /// The host refused something the engine needs.
    #[error("the host refused {what}: {source}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// The host's reason.
        source: std::io::Error,
    },
    /// A CPU state cannot be loaded.
    #[error("cannot load the CPU state: {0}")]
    BadState(String),
}
