//! Kernel modules: finds them in a module folder and orders them so that each comes after what it needs.
//!
//! Debian's kernel packages carry no `modules.dep` (it is made on installation), so the dependencies are read from
//! the modules themselves. Only the modules asked for and what they need are opened.

mod modinfo;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use modinfo::ModInfo;

use crate::cache::{CacheError, at_path};
use crate::decompress;

/// A module without compression, in bytes. The largest of Debian's have about 10 MiB.
const MAX_MODULE: u64 = 128 << 20;
/// Files that a module folder may hold; Debian's full kernel has about 4,500.
const MAX_FILES: usize = 50_000;
/// Nesting of folders below the module folder.
const MAX_DEPTH: usize = 16;

/// Why modules cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// Not a kernel's module folder.
    #[error(
        "`{0}` has more than {MAX_FILES} files or {MAX_DEPTH} nested folders; give a kernel's module folder"
    )]
    TooMany(PathBuf),
    /// The file is no module.
    #[error("`{0}` is not a kernel module for x86; install the kernel's modules again")]
    NotAModule(PathBuf),
    /// Compressed data that cannot be decoded.
    #[error("the kernel module `{path}` cannot be unpacked; install the kernel's modules again")]
    Damaged {
        /// The module's file.
        path: PathBuf,
        /// The decoder's complaint.
        #[source]
        source: io::Error,
    },
    /// A needs B needs A.
    #[error("the kernel module `{0}` needs itself through others; install the kernel's modules again")]
    Cycle(String),
    /// A module that another one needs is not there.
    #[error("the kernel module `{name}`, needed by `{needed_by}`, is not in `{folder}`")]
    MissingDependency {
        /// The missing module.
        name: String,
        /// Which module asks for it.
        needed_by: String,
        /// The folder searched.
        folder: PathBuf,
    },
    /// Reading the folder failed.
    #[error(transparent)]
    Store(#[from] CacheError),
}

/// A module folder: what is under `/lib/modules/RELEASE`.
#[derive(Debug)]
pub struct ModuleTree {
    folder: PathBuf,
    /// From module name to path inside the folder.
    files: BTreeMap<String, String>,
    builtin: BTreeSet<String>,
}

/// A module, ready to be packed.
#[derive(Debug, Clone)]
pub struct Module {
    /// With underscores, as `lsmod` shows it.
    pub name: String,
    /// Path below the module folder, without a compression suffix: `kernel/fs/fuse/fuse.ko`.
    pub path: String,
    /// The object file, without compression.
    pub contents: Vec<u8>,
    /// What it says about itself.
    pub info: ModInfo,
}

/// Modules in the order in which they have to be loaded.
#[derive(Debug, Default, Clone)]
pub struct Selection {
    /// Each comes after everything that it needs.
    pub modules: Vec<Module>,
    /// Names asked for that are neither a module here nor built into the kernel.
    pub missing: Vec<String>,
}

impl ModuleTree {
    /// Lists the modules under `folder`.
    ///
    /// # Errors
    /// The folder cannot be read or is absurdly large.
    pub fn open(folder: &Path) -> Result<Self, ModuleError> {
        let mut tree = Self { folder: folder.to_owned(), files: BTreeMap::new(), builtin: BTreeSet::new() };
        tree.scan(folder, "", 0, &mut 0)?;
        // A folder without this list is fine: then nothing is known to be built in.
        if let Ok(list) = fs::read_to_string(folder.join("modules.builtin")) {
            tree.builtin = list.lines().map(name_of).collect();
        }
        Ok(tree)
    }

    /// Is the driver of this name part of the kernel itself?
    pub fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains(&canonical(name))
    }

    /// Names of all modules in the folder, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// The modules `wanted` and all that they need, in loading order. A name that does not exist is reported in
    /// [`Selection::missing`]: kernels differ in what they offer, and the caller knows whether it matters.
    ///
    /// # Errors
    /// A module cannot be read, or what it needs is not there.
    pub fn select<S: AsRef<str>>(
        &self,
        wanted: impl IntoIterator<Item = S>,
    ) -> Result<Selection, ModuleError> {
        let mut selection = Selection::default();
        let mut state = BTreeMap::new();
        for name in wanted {
            let name = canonical(name.as_ref());
            if self.files.contains_key(&name) {
                self.visit(&name, &mut state, &mut selection.modules)?;
            } else if !self.builtin.contains(&name) {
                selection.missing.push(name);
            }
        }
        Ok(selection)
    }

    /// Depth-first; the depth is bounded by the number of modules, each of which is entered once.
    fn visit(
        &self,
        name: &str,
        state: &mut BTreeMap<String, Visit>,
        out: &mut Vec<Module>,
    ) -> Result<(), ModuleError> {
        match state.get(name) {
            Some(Visit::Done) => return Ok(()),
            Some(Visit::Open) => return Err(ModuleError::Cycle(name.to_owned())),
            None => {}
        }
        state.insert(name.to_owned(), Visit::Open);
        let module = self.load(name)?;
        for needed in &module.info.depends {
            if self.files.contains_key(needed) {
                self.visit(needed, state, out)?;
            } else if !self.builtin.contains(needed) {
                return Err(ModuleError::MissingDependency {
                    name: needed.clone(),
                    needed_by: name.to_owned(),
                    folder: self.folder.clone(),
                });
            }
        }
        for helpful in &module.info.soft_depends {
            // A soft dependency may point back; then the order does not matter.
            if self.files.contains_key(helpful) && !state.contains_key(helpful) {
                self.visit(helpful, state, out)?;
            }
        }
        state.insert(name.to_owned(), Visit::Done);
        out.push(module);
        Ok(())
    }

    fn load(&self, name: &str) -> Result<Module, ModuleError> {
        let relative = self.files.get(name).map(String::as_str).unwrap_or_default();
        let path = self.folder.join(relative);
        let damaged = |source| ModuleError::Damaged { path: path.clone(), source };
        let file = fs::File::open(&path).map_err(at_path("open", &path))?;
        let plain = decompress::by_suffix(relative, io::BufReader::new(file))
            .map_err(damaged)?
            .ok_or_else(|| ModuleError::NotAModule(path.clone()))?;
        let contents = decompress::read_at_most(plain, MAX_MODULE).map_err(damaged)?;
        let info = modinfo::parse(&contents).ok_or_else(|| ModuleError::NotAModule(path.clone()))?;
        let end = relative.find(".ko").map_or(relative.len(), |at| at + 3);
        let path = relative.get(..end).unwrap_or(relative).to_owned();
        Ok(Module { name: name.to_owned(), path, contents, info })
    }

    fn scan(
        &mut self,
        folder: &Path,
        prefix: &str,
        depth: usize,
        count: &mut usize,
    ) -> Result<(), ModuleError> {
        if depth > MAX_DEPTH {
            return Err(ModuleError::TooMany(self.folder.clone()));
        }
        for entry in fs::read_dir(folder).map_err(at_path("list", folder))? {
            let entry = entry.map_err(at_path("list", folder))?;
            *count += 1;
            if *count > MAX_FILES {
                return Err(ModuleError::TooMany(self.folder.clone()));
            }
            let Ok(name) = entry.file_name().into_string() else { continue };
            let kind = entry.file_type().map_err(at_path("list", folder))?;
            let relative = if prefix.is_empty() { name.clone() } else { format!("{prefix}/{name}") };
            // Links (`build`, `source`) lead out of the folder and hold no modules.
            if kind.is_dir() {
                self.scan(&entry.path(), &relative, depth + 1, count)?;
            } else if kind.is_file() && is_module(&name) {
                self.files.insert(name_of(&name), relative);
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Visit {
    Open,
    Done,
}

impl Selection {
    /// The text of `modules.dep`, from which `modprobe` in the guest learns what needs what.
    pub fn modules_dep(&self) -> String {
        let paths: BTreeMap<&str, &str> =
            self.modules.iter().map(|module| (module.name.as_str(), module.path.as_str())).collect();
        let mut text = String::new();
        for module in &self.modules {
            text.push_str(&module.path);
            text.push(':');
            // modprobe loads the list from its end, so everything that is needed goes in, nearest first.
            for needed in self.closure(&module.info).into_iter().rev() {
                if let Some(path) = paths.get(needed) {
                    text.push(' ');
                    text.push_str(path);
                }
            }
            text.push('\n');
        }
        text
    }

    /// The text of `modules.alias`, from which the guest learns which module drives a device.
    pub fn modules_alias(&self) -> String {
        let mut text = String::new();
        for module in &self.modules {
            for alias in module.info.aliases.iter().filter(|alias| !alias.contains(char::is_whitespace)) {
                text.push_str(&format!("alias {alias} {}\n", module.name));
            }
        }
        text
    }

    /// The modules `load` and all that they need, in loading order.
    pub fn loading_order<S: AsRef<str>>(&self, load: &[S]) -> Vec<&Module> {
        let names: BTreeSet<String> = load.iter().map(|name| canonical(name.as_ref())).collect();
        let mut wanted: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        for module in self.modules.iter().filter(|module| names.contains(&module.name)) {
            wanted.extend(self.closure(&module.info));
        }
        self.modules.iter().filter(|module| wanted.contains(module.name.as_str())).collect()
    }

    /// Names of everything that a module needs, in loading order.
    fn closure(&self, info: &ModInfo) -> Vec<&str> {
        let mut needed: BTreeSet<&str> =
            info.depends.iter().chain(&info.soft_depends).map(String::as_str).collect();
        // Against loading order each module comes before what it needs, so one pass finds all.
        let mut order = Vec::new();
        for module in self.modules.iter().rev() {
            if needed.contains(module.name.as_str()) {
                order.push(module.name.as_str());
                needed
                    .extend(module.info.depends.iter().chain(&module.info.soft_depends).map(String::as_str));
            }
        }
        order.reverse();
        order
    }
}

/// Module names treat `-` and `_` as the same; the kernel shows underscores.
pub(crate) fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn is_module(file: &str) -> bool {
    file.ends_with(".ko") || file.ends_with(".ko.xz") || file.ends_with(".ko.zst")
}

/// `kernel/drivers/char/hw_random/virtio-rng.ko.xz` gives `virtio_rng`.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    canonical(file.split(".ko").next().unwrap_or(file))
}

#[cfg(test)]
mod tests;
