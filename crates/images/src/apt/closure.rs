//! Packages together with everything they need, as apt itself works it out, and their files all at once.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::run::status_percent;
use super::{Apt, AptError, Package, records, verify};
use crate::cache::at_path;
use crate::digest::Digest;
use crate::progress::Progress;

impl Apt {
    /// The named packages and all that they depend on, recommendations left out, as apt would install them on an
    /// empty system; in apt's order.
    ///
    /// # Errors
    /// [`AptError::Failed`] with apt's reasons if they cannot be installed together, and others.
    pub fn closure(&mut self, names: &[&str], progress: &mut dyn Progress) -> Result<Vec<Package>, AptError> {
        self.freshen(progress)?;
        progress.step("Resolving dependencies", None);
        let mut arguments =
            vec!["--simulate", "--no-install-recommends", "-o", "APT::Install-Suggests=0", "install"];
        arguments.extend(names);
        let mut output = self.tools.run("apt-get", &arguments, None, &mut |_| {})?;
        if !output.success && !self.updated {
            self.update(progress)?;
            output = self.tools.run("apt-get", &arguments, None, &mut |_| {})?;
        }
        if !output.success {
            return match &self.trouble {
                Some(trouble) => Err(AptError::Unreachable(trouble.clone())),
                None => Err(self.tools.explain("apt-get", &output)),
            };
        }
        let chosen = installed(&output.stdout);
        let wanted: Vec<String> = chosen.iter().map(|(name, version)| format!("{name}={version}")).collect();
        let mut arguments = vec!["show"];
        arguments.extend(wanted.iter().map(String::as_str));
        let output = self.tools.run("apt-cache", &arguments, None, &mut |_| {})?;
        let mut known: HashMap<(String, String), Package> = records::parse(&output.stdout)
            .into_iter()
            .map(|package| ((package.name.clone(), package.version.clone()), package))
            .collect();
        chosen
            .into_iter()
            .map(|(name, version)| {
                known.remove(&(name.clone(), version.clone())).ok_or_else(|| AptError::NotFound {
                    name,
                    wanted: format!(" of exactly version {version}"),
                    hint: String::new(),
                })
            })
            .collect()
    }

    /// Fetches the files of many packages into the empty folder `into` and checks each against the signed lists. Gives
    /// their paths, in the order of `packages`.
    ///
    /// # Errors
    /// As [`Self::download`].
    pub fn download_all(
        &self,
        packages: &[Package],
        into: &Path,
        progress: &mut dyn Progress,
    ) -> Result<Vec<PathBuf>, AptError> {
        let total = packages.iter().fold(0_u64, |sum, package| sum.saturating_add(package.size));
        progress.step(&format!("Fetching {} packages", packages.len()), Some(total));
        let wanted: Vec<String> =
            packages.iter().map(|package| format!("{}={}", package.name, package.version)).collect();
        let mut arguments = vec!["download"];
        arguments.extend(wanted.iter().map(String::as_str));
        let mut done = 0;
        let output = self.tools.run("apt-get", &arguments, Some(into), &mut |line| {
            if let Some(percent) = status_percent(line) {
                done = done.max((total as f64 * percent / 100.0) as u64);
                progress.advance(done.min(total));
            }
        })?;
        if !output.success {
            return Err(self.tools.explain("apt-get", &output));
        }
        // apt's way of naming files is its own affair: the hash tells which file is whose.
        let mut by_digest = HashMap::new();
        for entry in fs::read_dir(into).map_err(at_path("list", into))?.flatten() {
            let path = entry.path();
            let (digest, _) = Digest::of_file(&path).map_err(at_path("read", &path))?;
            by_digest.insert(digest.to_string(), path);
        }
        let files = packages.iter().map(|package| match by_digest.get(&package.sha256.to_string()) {
            Some(path) => verify(package, path).map(|()| path.clone()),
            None => Err(AptError::HashMismatch {
                name: package.name.clone(),
                version: package.version.clone(),
                wanted: format!("{} bytes, {}", package.size, package.sha256),
                got: "no file with this hash".to_owned(),
            }),
        });
        let files = files.collect::<Result<Vec<_>, _>>()?;
        progress.advance(total);
        Ok(files)
    }
}

/// Names and versions in `Inst bash (5.2.15-2 Debian:12/stable [amd64])`, apt-get(8) `--simulate`.
fn installed(simulation: &str) -> Vec<(String, String)> {
    let one = |line: &str| {
        let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
        let (_, version) = rest.split_once('(')?;
        let version = version.split([' ', ')']).next()?;
        // Another architecture's packages carry its name; there are none unless somebody asks for them.
        (!version.is_empty()).then(|| (name.to_owned(), version.to_owned()))
    };
    simulation.lines().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apt::Architecture;
    use crate::progress::Quiet;
    use crate::testing::FakeApt;

    #[test]
    fn simulation_gives_names_and_versions_in_order() {
        let text = "NOTE: This is only a simulation!\nInst libc6 (2.36-9 Debian:12/stable [amd64]) []\n\
                    Inst bash [5.1] (5.2.15-2+b2 Debian:12/stable [amd64])\nConf libc6 (2.36-9 Debian [amd64])\n\
                    Inst broken\nInst odd (\n";
        let own = |(name, version): (&str, &str)| (name.to_owned(), version.to_owned());
        assert_eq!(installed(text), [("libc6", "2.36-9"), ("bash", "5.2.15-2+b2")].map(own));
    }

    #[test]
    fn closure_is_found_downloaded_and_given_in_its_order() {
        let (fake, state) = (FakeApt::new(), tempfile::tempdir().expect("a scratch folder"));
        fake.serve("b", "1:2", "", b"file of b");
        fake.serve("a", "1", "b", b"file of a");
        let mut apt = Apt::with_search_path(state.path(), Architecture::Amd64, Some(fake.path().into()))
            .expect("prepares");
        let packages = apt.closure(&["b", "a"], &mut Quiet).expect("resolves");
        let names: Vec<&str> = packages.iter().map(|package| package.name.as_str()).collect();
        assert_eq!(names, ["b", "a"]);
        let into = tempfile::tempdir().expect("a scratch folder");
        let files = apt.download_all(&packages, into.path(), &mut Quiet).expect("downloads");
        let contents: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).expect("reads")).collect();
        assert_eq!(contents, [b"file of b", b"file of a"]);
        // A file that was changed on its way is nobody's.
        fs::write(fake.deb_of("a"), b"file of x").expect("writes");
        let into = tempfile::tempdir().expect("a scratch folder");
        let error = apt.download_all(&packages, into.path(), &mut Quiet).expect_err("differs");
        assert!(matches!(&error, AptError::HashMismatch { name, .. } if name == "a"), "{error}");
    }
}
