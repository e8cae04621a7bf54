//! The one test that goes to the network: the default image, through this host's apt, into an empty cache.

use std::time::{Duration, Instant};

use ringfence_images::apt::AptError;
use ringfence_images::cache::Cache;
use ringfence_images::{Catalogue, ImageError, Progress, Quiet};

/// Notes every step, and that bytes never run backwards or beyond a known total.
#[derive(Default)]
struct Notes {
    steps: Vec<String>,
    total: Option<u64>,
    done: u64,
}

impl Progress for Notes {
    fn step(&mut self, what: &str, total: Option<u64>) {
        self.steps.push(what.to_owned());
        (self.total, self.done) = (total, 0);
    }

    fn advance(&mut self, done: u64) {
        assert!(
            done >= self.done && self.total.is_none_or(|total| done <= total),
            "{done} in {:?}",
            self.steps.last()
        );
        self.done = done;
    }
}

#[test]
fn default_image_is_fetched_into_an_empty_cache() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let catalogue = Catalogue::in_cache(Cache::at(folder.path().join("cache")));
    let mut notes = Notes::default();
    let image = match catalogue.ensure(Catalogue::DEFAULT, &mut notes) {
        // On a host of another kind all that can be shown is the advice.
        Err(error @ ImageError::Apt(AptError::Missing(_))) => {
            assert!(error.to_string().contains("--kernel"));
            return;
        }
        other => other.expect("the host's package sources have the image"),
    };
    for step in ["Fetching package lists", "Fetching linux-image-", "Unpacking busybox-static"] {
        assert!(notes.steps.iter().any(|seen| seen.starts_with(step)), "no `{step}` in {:?}", notes.steps);
    }

    // Linux/x86 boot protocol: `HdrS` at 0x202.
    let kernel = std::fs::read(&image.kernel).expect("reads");
    assert_eq!(kernel.get(0x202..0x206), Some(&b"HdrS"[..]));
    let initrd = std::fs::read(image.initrd.as_ref().expect("is one in memory")).expect("reads");
    assert!(initrd.starts_with(b"070701") && initrd.len() > 2 << 20);
    assert!(image.modules.iter().any(|name| name == "overlay"), "{:?}", image.modules);
    assert!(
        image.kernel_release.starts_with(|first: char| first.is_ascii_digit()),
        "{}",
        image.kernel_release
    );

    // Found again without apt, at once. The best of several, since other tests share the processors.
    let offline = catalogue.with_search_path("/nonexistent");
    let best = (0..5)
        .map(|_| {
            let start = Instant::now();
            assert_eq!(offline.ensure(Catalogue::DEFAULT, &mut Quiet).expect("is cached"), image);
            start.elapsed()
        })
        .min();
    assert!(best.is_some_and(|time| time < Duration::from_millis(20)), "{best:?}");
}
