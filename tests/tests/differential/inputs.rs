//! Edits of what is read somewhere in a world. Pure.

use harness::Chance;

use crate::grow;
use crate::steps::Edit;
use crate::world::{Ask, Krate, Part, Read, Value, World};

/// An edit of something that is read, nearly always; now and then of something nobody reads.
pub fn edit(chance: &mut Chance, world: &World) -> Edit {
    let mut edits = Vec::new();
    for krate in &world.crates {
        let parts = krate.targets.iter().flat_map(|target| &target.parts);
        edits.extend(parts.filter_map(|part| of_part(chance, world, krate, part)));
        let reads = krate.script.iter().flat_map(|script| &script.reads);
        edits.extend(reads.filter_map(|read| of_read(chance, world, krate, read)));
    }
    let chosen = chance.pick(&edits).cloned();
    chosen
        .filter(|_| chance.percent(90))
        .unwrap_or_else(|| Edit::Env("KF_NEW".to_owned(), maybe(chance)))
}

fn maybe(chance: &mut Chance) -> Option<Value> {
    chance.percent(75).then(|| grow::value(chance))
}

fn number(chance: &mut Chance) -> u8 {
    u8::from(chance.percent(50))
}

fn of_part(chance: &mut Chance, world: &World, krate: &Krate, part: &Part) -> Option<Edit> {
    let here = || krate.name.clone();
    Some(match part {
        Part::Include(_, name, _) if name == "link.txt" => Edit::Link(here(), grow::value(chance)),
        Part::Include(_, name, _) => {
            // One that is missing is an error, as it should be at times.
            let value = chance.percent(95).then(|| grow::value(chance));
            Edit::File(here(), name.clone(), value)
        }
        Part::IncludeShared(name) => Edit::Shared(name.clone(), Some(grow::value(chance))),
        Part::IncludeCurrent => Edit::Current(grow::value(chance)),
        Part::Variable(name, false) => variable(chance, world, name),
        Part::Feature(_) => Edit::Default(here(), number(chance)),
        Part::Macro(name, ask) => return of_ask(chance, world, krate, name, ask),
        _ => return None,
    })
}

fn of_ask(
    chance: &mut Chance,
    world: &World,
    krate: &Krate,
    name: &str,
    ask: &Ask,
) -> Option<Edit> {
    let here = || krate.name.clone();
    Some(match ask {
        Ask::Read(name) | Ask::ReadFromHere(name) | Ask::Length(name) | Ask::Climb(name) => {
            Edit::File(here(), name.clone(), maybe(chance))
        }
        Ask::ReadShared(name) => Edit::Shared(name.clone(), maybe(chance)),
        Ask::List => Edit::Listed(here(), number(chance)),
        Ask::ListShared => Edit::SharedListed(number(chance)),
        Ask::Variable(name) => variable(chance, world, name),
        Ask::Variables => variable(chance, world, "KF_NEW"),
        Ask::Link => Edit::Link(here(), grow::value(chance)),
        Ask::Current => Edit::Current(grow::value(chance)),
        Ask::Tag => Edit::Listed(name.to_owned(), number(chance)),
        Ask::Generated | Ask::Fail(_) | Ask::DirectoryName => return None,
    })
}

fn of_read(chance: &mut Chance, world: &World, krate: &Krate, read: &Read) -> Option<Edit> {
    let here = || krate.name.clone();
    Some(match read {
        Read::File(name) | Read::ByCommand(name) => Edit::File(here(), name.clone(), maybe(chance)),
        Read::Shared(name) => Edit::Shared(name.clone(), maybe(chance)),
        Read::List => Edit::Listed(here(), number(chance)),
        Read::ListShared => Edit::SharedListed(number(chance)),
        Read::Variable(name) => variable(chance, world, name),
        Read::Variables => variable(chance, world, "KF_NEW"),
        Read::Link => Edit::Link(here(), grow::value(chance)),
        Read::Metadata | Read::Cargo(_) | Read::Deps => return None,
    })
}

fn variable(chance: &mut Chance, world: &World, name: &str) -> Edit {
    let value = maybe(chance);
    if name == "KF_CONFIG" {
        let mut settings = world.settings.clone();
        settings.config_env = value;
        return Edit::Settings(settings);
    }
    Edit::Env(name.to_owned(), value)
}
