//! `ringfence image`.

use std::io::{Write, stdout};
use std::path::Path;

use ringfence_images::{Catalogue, Image, Listing, NewImage, create_disk};
use ringfence_machine::{ByteSize, DiskFormat, DiskSpec};
use serde_json::json;

use crate::args::{Format, ImageCommand, NewDisk};
use crate::exit::{Failure, SUCCESS};
use crate::progress::Bars;
use crate::table::columns;

pub(crate) fn image(command: &ImageCommand) -> Result<u8, Failure> {
    if let ImageCommand::Create(new) = command {
        return create(new);
    }
    let catalogue = Catalogue::builtin().map_err(Failure::failed)?;
    let text = match command {
        ImageCommand::Ls(listing) => match listing.format {
            Format::Table => table(&catalogue.list()),
            Format::Json => json_text(&catalogue.list())?,
        },
        ImageCommand::Pull { name } => {
            let mut bars = Bars::new();
            let (image, changed) = catalogue.pull(name, &mut bars).map_err(Failure::failed)?;
            let state = if changed { "fetched" } else { "already the newest" };
            format!("{}: Linux {}, {state}\n", image.name, image.kernel_release)
        }
        ImageCommand::Rm { name } => {
            let removed = catalogue.remove(name).map_err(Failure::failed)?;
            format!("{name}: {}\n", if removed { "removed" } else { "was not on disk" })
        }
        ImageCommand::Create(_) => String::new(),
    };
    stdout().write_all(text.as_bytes()).map_err(Failure::failed)?;
    Ok(SUCCESS)
}

/// Makes a disk image, and says how to use it.
fn create(new: &NewDisk) -> Result<u8, Failure> {
    let format = new.format.unwrap_or(match new.backing {
        Some(_) => DiskFormat::Qcow2,
        None => DiskFormat::Raw,
    });
    let image = NewImage {
        path: new.file.clone(),
        format,
        size: new.size.map(|size| size.0),
        backing: new.backing.clone().zip(new.backing_format),
    };
    let size = create_disk(&image).map_err(Failure::failed)?;
    let mut spec = DiskSpec { format, ..DiskSpec::new(&new.file) };
    if let Some(backing) = &new.backing {
        let below = new.file.parent().unwrap_or(Path::new("")).join(backing);
        let folder = below.parent().filter(|folder| !folder.as_os_str().is_empty());
        spec.backing = Some(folder.unwrap_or(Path::new(".")).to_owned());
    }
    let text = format!("{}: a disk of {}; use it by --disk {spec}\n", new.file.display(), ByteSize(size));
    stdout().write_all(text.as_bytes()).map_err(Failure::failed)?;
    Ok(SUCCESS)
}

fn table(listings: &[Listing]) -> String {
    let mut rows = vec![["NAME", "KERNEL", "SIZE", "DESCRIPTION"].map(str::to_owned)];
    for listing in listings {
        let cached = |field: fn(&Image) -> String| listing.cached.as_ref().map_or("-".to_owned(), field);
        rows.push([
            listing.name.clone(),
            cached(|image| image.kernel_release.clone()),
            cached(|image| ByteSize(image.size).to_string()),
            listing.description.clone(),
        ]);
    }
    columns(&rows)
}

fn json_text(listings: &[Listing]) -> Result<String, Failure> {
    let entries: Vec<_> = listings
        .iter()
        .map(|listing| {
            let cached = listing.cached.as_ref().map(|image| {
                json!({
                    "kernel": image.kernel, "initrd": image.initrd, "disk": image.disk, "append": image.append,
                    "kernel_release": image.kernel_release, "modules": image.modules, "size": image.size,
                    "packages": image.packages.iter().map(|(name, version)| json!({"name": name, "version": version}))
                        .collect::<Vec<_>>(),
                })
            });
            json!({"name": listing.name, "description": listing.description, "cached": cached})
        })
        .collect();
    let text = serde_json::to_string_pretty(&entries).map_err(Failure::failed)?;
    Ok(text + "\n")
}
