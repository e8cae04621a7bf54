//! The built-in images by name: makes sure that they are on disk, lists them, removes them.

use std::path::{Path, PathBuf};

use crate::apt::{Apt, AptError, Package};
use crate::cache::{Cache, CacheError};
use crate::cpio::CpioError;
use crate::deb::DebError;
use crate::manifest::Manifest;
use crate::modules::ModuleError;
use crate::progress::Progress;
use crate::recipe::{self, Contents, INITRD, KERNEL, RECIPES, ROOT_DISK, Recipe};
use crate::rootfs::{RootError, tools::Tools};

/// Why an image cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No such name.
    #[error("there is no image `{name}`; there is {known}")]
    Unknown {
        /// The name asked for.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// Known, but not on disk.
    #[error("the image `{0}` is not on this host yet; fetch it with `ringfence image pull {0}`")]
    NotCached(String),
    /// The package that should lead to a kernel does not.
    #[error("the host's packages for the image `{image}` hold no kernel; give `--kernel FILE --initrd FILE`")]
    NoKernel {
        /// The image.
        image: &'static str,
    },
    /// A package lacks a file that the image is made of.
    #[error(
        "the host's packages for the image `{image}` hold no `{file}`; give `--kernel FILE --initrd FILE`"
    )]
    MissingFile {
        /// The image.
        image: &'static str,
        /// What is missing.
        file: String,
    },
    /// The packages cannot be had.
    #[error(transparent)]
    Apt(#[from] AptError),
    /// A package cannot be unpacked.
    #[error(transparent)]
    Deb(#[from] DebError),
    /// The kernel's modules cannot be read.
    #[error(transparent)]
    Modules(#[from] ModuleError),
    /// The initial RAM disk cannot be built.
    #[error(transparent)]
    Initramfs(#[from] CpioError),
    /// The root file system cannot be made.
    #[error(transparent)]
    Root(#[from] RootError),
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// An image on disk, ready to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its name in the catalogue.
    pub name: String,
    /// One line about it.
    pub description: String,
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// The initial RAM disk, an uncompressed cpio archive to which others can be appended. `None` for an image with a
    /// disk.
    pub initrd: Option<PathBuf>,
    /// A raw disk image with the root file system, to be the first NVMe disk. It is shared by all machines and has to
    /// stay as it is: let what they write go elsewhere.
    pub disk: Option<PathBuf>,
    /// Kernel command line that it wants.
    pub append: String,
    /// As `uname -r` prints it in the guest.
    pub kernel_release: String,
    /// Modules in the initial RAM disk, in loading order.
    pub modules: Vec<String>,
    /// Packages that it was made from: name and version.
    pub packages: Vec<(String, String)>,
    /// Bytes that it takes on disk.
    pub size: u64,
}

/// A line of the catalogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The image's name.
    pub name: String,
    /// One line about it.
    pub description: String,
    /// What is on disk, if anything usable is.
    pub cached: Option<Image>,
}

/// The built-in images, and the cache that keeps them.
#[derive(Debug, Clone)]
pub struct Catalogue {
    cache: Cache,
    /// Where apt and other programs are looked up, if not in `PATH`.
    search_path: Option<std::ffi::OsString>,
}

impl Catalogue {
    /// Name of the image that is meant when none is given.
    pub const DEFAULT: &'static str = "shell";

    /// The built-in images in the user's cache folder.
    ///
    /// # Errors
    /// There is no such folder to be found; see [`Cache::of_user`].
    pub fn builtin() -> Result<Self, ImageError> {
        Ok(Self::in_cache(Cache::of_user()?))
    }

    /// The built-in images in the given cache.
    pub fn in_cache(cache: Cache) -> Self {
        Self { cache, search_path: None }
    }

    /// Looks apt and the other programs up in `path` (as in `PATH`) instead of the environment's search path.
    #[must_use]
    pub fn with_search_path(mut self, path: impl Into<std::ffi::OsString>) -> Self {
        self.search_path = Some(path.into());
        self
    }

    /// The cache.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The image, if it is on disk, undamaged, and what this version would make.
    ///
    /// # Errors
    /// [`ImageError::Unknown`], [`ImageError::NotCached`].
    pub fn find(&self, name: &str) -> Result<Image, ImageError> {
        let recipe = recipe_of(name)?;
        match self.state(recipe) {
            State::Ready(manifest) => Ok(self.image(recipe, &manifest)),
            State::OldInitrd(_) | State::Absent => Err(ImageError::NotCached(name.to_owned())),
        }
    }

    /// The image; fetched and built first if it is not on disk, damaged or out of date.
    ///
    /// # Errors
    /// Everything in [`ImageError`] but [`ImageError::NotCached`].
    pub fn ensure(&self, name: &str, progress: &mut dyn Progress) -> Result<Image, ImageError> {
        let recipe = recipe_of(name)?;
        if let State::Ready(manifest) = self.state(recipe) {
            return Ok(self.image(recipe, &manifest));
        }
        let lock =
            self.cache.lock(&mut || progress.step("Waiting for another ringfence to fetch images", None))?;
        // Somebody else may have done it meanwhile.
        match self.state(recipe) {
            State::Ready(manifest) => return Ok(self.image(recipe, &manifest)),
            State::OldInitrd(mut manifest) => {
                let folder = self.cache.image(recipe.name);
                if manifest.all_intact(&folder, |path| path != INITRD) {
                    progress.step("Building the initial RAM disk", None);
                    let scratch = self.cache.scratch(&lock)?;
                    recipe::rebuild_initrd(recipe, &folder, &mut manifest, scratch.path())?;
                    return Ok(self.image(recipe, &manifest));
                }
            }
            State::Absent => {}
        }
        let mut apt = self.apt(recipe)?;
        let packages = recipe::resolve(&mut apt, recipe, progress)?;
        self.make(&mut apt, recipe, packages, &lock, progress)
    }

    /// Like [`Self::ensure`], but looks for newer packages first. The second value tells whether anything changed.
    ///
    /// # Errors
    /// Everything in [`ImageError`] but [`ImageError::NotCached`].
    pub fn pull(&self, name: &str, progress: &mut dyn Progress) -> Result<(Image, bool), ImageError> {
        let recipe = recipe_of(name)?;
        let lock =
            self.cache.lock(&mut || progress.step("Waiting for another ringfence to fetch images", None))?;
        let mut apt = self.apt(recipe)?;
        apt.update(progress)?;
        let packages = recipe::resolve(&mut apt, recipe, progress)?;
        if let State::Ready(manifest) = self.state(recipe)
            && manifest.origins == packages.iter().map(recipe::origin).collect::<Vec<_>>()
            && manifest.all_intact(&self.cache.image(recipe.name), |_| true)
        {
            return Ok((self.image(recipe, &manifest), false));
        }
        Ok((self.make(&mut apt, recipe, packages, &lock, progress)?, true))
    }

    /// All images, with what is on disk.
    pub fn list(&self) -> Vec<Listing> {
        RECIPES
            .iter()
            .map(|recipe| Listing {
                name: recipe.name.to_owned(),
                description: recipe.description.to_owned(),
                cached: match self.state(recipe) {
                    State::Ready(manifest) | State::OldInitrd(manifest) => {
                        Some(self.image(recipe, &manifest))
                    }
                    State::Absent => None,
                },
            })
            .collect()
    }

    /// Removes the image from disk; gives `false` if it was not there.
    ///
    /// # Errors
    /// [`ImageError::Unknown`], [`ImageError::Cache`].
    pub fn remove(&self, name: &str) -> Result<bool, ImageError> {
        let recipe = recipe_of(name)?;
        if !self.cache.image(recipe.name).exists() {
            return Ok(false);
        }
        let lock = self.cache.lock(&mut || {})?;
        Ok(self.cache.retire(&lock, recipe.name)?)
    }

    fn apt(&self, recipe: &Recipe) -> Result<Apt, AptError> {
        let architecture = recipe.architecture;
        let state = self.cache.apt_state(architecture);
        Apt::with_search_path(&state, architecture, self.search_path.clone())
    }

    fn make(
        &self,
        apt: &mut Apt,
        recipe: &Recipe,
        packages: Vec<Package>,
        lock: &crate::cache::Lock,
        progress: &mut dyn Progress,
    ) -> Result<Image, ImageError> {
        let scratch = self.cache.scratch(lock)?;
        let tools = Tools::new(self.search_path.as_deref());
        let make = |apt: &Apt, packages: &[Package], scratch: &Path, progress: &mut dyn Progress| match recipe
            .contents
        {
            Contents::Memory => recipe::make(apt, recipe, packages, scratch, progress),
            Contents::Disk { .. } => recipe::disk::make(apt, recipe, packages, &tools, scratch, progress),
        };
        let ready = match make(apt, &packages, scratch.path(), progress) {
            // The lists may be from before a mirror's last change: look once more.
            Err(ImageError::Apt(AptError::Unreachable(_) | AptError::Failed { .. })) => {
                apt.update(progress)?;
                let packages = recipe::resolve(apt, recipe, progress)?;
                let again = scratch.path().join("again");
                std::fs::create_dir(&again).map_err(crate::cache::at_path("create", &again))?;
                make(apt, &packages, &again, progress)?
            }
            other => other?,
        };
        self.cache.publish(lock, recipe.name, &ready)?;
        match self.state(recipe) {
            State::Ready(manifest) => Ok(self.image(recipe, &manifest)),
            State::OldInitrd(_) | State::Absent => Err(ImageError::NotCached(recipe.name.to_owned())),
        }
    }

    /// What is on disk, judged by a few file lookups.
    fn state(&self, recipe: &Recipe) -> State {
        let folder = self.cache.image(recipe.name);
        let Some(manifest) = Manifest::load(&folder) else { return State::Absent };
        if manifest.image != recipe.name
            || manifest.contents_recipe != recipe::contents_fingerprint(recipe)
            || !manifest.intact(&folder, KERNEL, false)
        {
            return State::Absent;
        }
        if recipe.on_disk() {
            let whole = manifest.intact(&folder, ROOT_DISK, false);
            return if whole { State::Ready(manifest) } else { State::Absent };
        }
        if manifest.initrd_recipe != recipe::initrd_fingerprint() || !manifest.intact(&folder, INITRD, false)
        {
            return State::OldInitrd(manifest);
        }
        State::Ready(manifest)
    }

    fn image(&self, recipe: &Recipe, manifest: &Manifest) -> Image {
        let folder = self.cache.image(recipe.name);
        Image {
            name: recipe.name.to_owned(),
            description: recipe.description.to_owned(),
            kernel: folder.join(KERNEL),
            initrd: (!recipe.on_disk()).then(|| folder.join(INITRD)),
            disk: recipe.on_disk().then(|| folder.join(ROOT_DISK)),
            append: recipe.append.to_owned(),
            kernel_release: manifest.kernel_release.clone(),
            modules: manifest.modules.clone(),
            packages: manifest
                .origins
                .iter()
                .map(|from| (from.package.clone(), from.version.clone()))
                .collect(),
            size: manifest.size(),
        }
    }
}

enum State {
    Ready(Manifest),
    /// Everything is there but the initial RAM disk, which has to be built again.
    OldInitrd(Manifest),
    Absent,
}

fn recipe_of(name: &str) -> Result<&'static Recipe, ImageError> {
    RECIPES.iter().find(|recipe| recipe.name == name).ok_or_else(|| ImageError::Unknown {
        name: name.to_owned(),
        known: RECIPES.iter().map(|recipe| recipe.name).collect::<Vec<_>>().join(", "),
    })
}

#[cfg(test)]
mod tests;
