//! The network's process.

use ringfence_helper::{Helper, HelperError, Link};

use crate::error::NetError;
use crate::spec::{Backend, NetSpec};
use crate::wire::MAX_MESSAGE;
use crate::{tap, user};

/// The hidden subcommand of our program that becomes [`helper_main`].
pub const SUBCOMMAND: &str = "net-helper";

/// Starts the process for a network card and waits until the network is there.
///
/// # Errors
/// [`NetError`], which tells what the process could not have, such as a port to listen on.
pub fn start(spec: &NetSpec) -> Result<Helper, NetError> {
    Helper::start_with_rings(SUBCOMMAND, &spec.to_string(), MAX_MESSAGE).map_err(|error| match error {
        HelperError::Start(source) => NetError::Start(source),
        HelperError::Refused(text) => NetError::Refused(text),
    })
}

/// What the process does: serves the link at standard input until that closes. Returns its exit status.
pub fn helper_main(spec: &str) -> u8 {
    let Ok(spec) = spec.parse::<NetSpec>() else { return 2 };
    ringfence_helper::helper_main(|mut link, ready| {
        link.take_rings(MAX_MESSAGE).map_err(NetError::Host)?;
        serve(link, &spec, |_| ready())
    })
}

/// Serves the guest at the other end of `link`; `ready` is called when the network is there.
pub(crate) fn serve(link: Link, spec: &NetSpec, ready: impl FnOnce(&Link)) -> Result<(), NetError> {
    match &spec.backend {
        Backend::User(user) => user::serve(link, spec, user, ready),
        Backend::Tap(name) => tap::serve(&link, name, spec, ready),
    }
}
