//! The names of one directory.
//!
//! Each name has a cookie made from the name alone, so a listing can go on where it stopped however
//! the directory changed meanwhile, and in another daemon too; and a name is found by its cookie.
//! Most directories of a target have a handful of names, some have thousands: both must be small.

use std::collections::BTreeMap;

use store::{Digest, Ino};

/// The names of a directory.
#[derive(Debug)]
pub struct Directory {
    /// The directory that holds this one; itself for the root.
    pub parent: Option<Ino>,
    names: Names,
}

/// Names in order of their cookies.
#[derive(Debug)]
enum Names {
    /// As a tree these would take three times as much.
    Few(Vec<Name>),
    Many(BTreeMap<u64, Name>),
}

#[derive(Debug)]
struct Name {
    cookie: u64,
    bytes: Box<[u8]>,
    ino: Ino,
}

/// More names than this are many.
const FEW: usize = 16;

/// Cookies 1 and 2 are `.` and `..`.
const FIRST_COOKIE: u64 = 3;
/// Cookies travel as `off_t`, which has a sign.
const LAST_COOKIE: u64 = i64::MAX as u64;
/// How far behind its own cookie a name may be that met another there. A matter of theory: of
/// 100,000 names, two meet in one of a billion directories.
const REACH: u64 = 1 << 20;

/// The cookie a name has wherever no other name took it first.
fn cookie_of(name: &[u8]) -> u64 {
    let digest = Digest::of(name);
    let first = digest.as_bytes().iter().take(8);
    let number = first.fold(0, |number, byte| number << 8 | u64::from(*byte));
    (number & LAST_COOKIE).clamp(FIRST_COOKIE, LAST_COOKIE - REACH)
}

impl Directory {
    /// An empty directory in `parent`.
    pub fn new(parent: Ino) -> Self {
        Self {
            parent: Some(parent),
            names: Names::Few(Vec::new()),
        }
    }

    /// The inode `name` names.
    pub fn get(&self, name: &[u8]) -> Option<Ino> {
        self.find(name).map(|found| found.ino)
    }

    fn find(&self, name: &[u8]) -> Option<&Name> {
        let cookie = cookie_of(name);
        self.names
            .from(cookie)
            .take_while(|found| found.cookie < cookie + REACH)
            .find(|found| *found.bytes == *name)
    }

    /// Gives `ino` the name, instead of what had it.
    pub fn insert(&mut self, name: &[u8], ino: Ino) {
        let cookie = match self.find(name) {
            Some(found) => found.cookie,
            None => self.names.free(cookie_of(name)),
        };
        let bytes = name.into();
        self.names.put(Name { cookie, bytes, ino });
    }

    /// Takes the name away.
    pub fn remove(&mut self, name: &[u8]) -> Option<Ino> {
        let (cookie, ino) = self.find(name).map(|found| (found.cookie, found.ino))?;
        self.names.take(cookie);
        Some(ino)
    }

    /// Makes the names take as little as they can, once many were added in no order.
    pub fn pack(&mut self) {
        match &mut self.names {
            Names::Few(names) => names.shrink_to_fit(),
            // Made anew from what is in order, a tree has no room left.
            Names::Many(names) => *names = std::mem::take(names).into_iter().collect(),
        }
    }

    /// Whether there are no names.
    pub fn is_empty(&self) -> bool {
        self.names.from(0).next().is_none()
    }

    /// Names after `cookie`, in order of their cookies.
    pub fn after(&self, cookie: u64) -> impl Iterator<Item = (u64, &[u8], Ino)> {
        self.names
            .from(cookie.saturating_add(1))
            .map(|name| (name.cookie, &*name.bytes, name.ino))
    }
}

impl Names {
    /// From a cookie on.
    fn from(&self, cookie: u64) -> impl Iterator<Item = &Name> {
        let (few, many) = match self {
            Self::Few(names) => (names.get(position(names, cookie)..), None),
            Self::Many(names) => (None, Some(names.range(cookie..))),
        };
        let many = many.into_iter().flatten().map(|(_, name)| name);
        few.unwrap_or_default().iter().chain(many)
    }

    /// The first cookie from this one on that no name has.
    fn free(&self, own: u64) -> u64 {
        let taken = self.from(own).zip(own..);
        let in_a_row = taken.take_while(|(name, cookie)| name.cookie == *cookie);
        own + in_a_row.count() as u64
    }

    /// Adds a name, instead of the one that has its cookie.
    fn put(&mut self, name: Name) {
        match self {
            Self::Few(names) => {
                let at = position(names, name.cookie);
                if names
                    .get(at)
                    .is_some_and(|found| found.cookie == name.cookie)
                {
                    names[at] = name;
                } else if names.len() < FEW {
                    names.insert(at, name);
                } else {
                    let few = std::mem::take(names).into_iter();
                    let all = few.chain([name]).map(|name| (name.cookie, name));
                    *self = Self::Many(all.collect());
                }
            }
            Self::Many(names) => {
                names.insert(name.cookie, name);
            }
        }
    }

    /// Removes the name of a cookie. Many stay many, however few are left: emptied directories go
    /// or are filled again.
    fn take(&mut self, cookie: u64) {
        match self {
            Self::Few(names) => names.retain(|name| name.cookie != cookie),
            Self::Many(names) => {
                names.remove(&cookie);
            }
        }
    }
}

fn position(names: &[Name], cookie: u64) -> usize {
    names.partition_point(|name| name.cookie < cookie)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Directory, cookie: u64) -> Vec<Vec<u8>> {
        let after = directory.after(cookie);
        after.map(|(_, name, _)| name.to_vec()).collect()
    }

    #[test]
    fn names_that_meet_are_told_apart() {
        // As few, and as many.
        for others in [0, 40] {
            let mut directory = Directory::new(Ino::ROOT);
            for number in 0..others {
                directory.insert(format!("other {number}").as_bytes(), Ino(number + 100));
            }
            let own = cookie_of(b"late");
            for number in 0..3 {
                let (cookie, name) = (own + number, format!("early {number}").into_bytes());
                let (name, ino) = (name.into(), Ino(number + 10));
                directory.names.put(Name {
                    cookie,
                    bytes: name,
                    ino,
                });
            }
            directory.insert(b"late", Ino(20));
            assert_eq!(directory.get(b"late"), Some(Ino(20)));
            directory.names.take(own + 1);
            assert_eq!(directory.get(b"late"), Some(Ino(20)));
            directory.insert(b"late", Ino(21));
            assert_eq!(names(&directory, own + 2)[0], b"late");
            assert_eq!(directory.remove(b"late"), Some(Ino(21)));
            assert_eq!(directory.get(b"late"), None);
            assert_eq!(directory.after(0).count() as u64, others + 2);
        }
    }

    #[test]
    fn few_and_many_are_the_same_to_see() {
        for count in [0, 1, FEW - 1, FEW, FEW + 1, 3 * FEW] {
            let mut directory = Directory::new(Ino::ROOT);
            let all: Vec<_> = (0..count)
                .map(|n| format!("name {n}").into_bytes())
                .collect();
            for (number, name) in all.iter().enumerate() {
                directory.insert(name, Ino(1));
                directory.insert(name, Ino(number as u64));
            }
            directory.pack();
            let mut expected = all.clone();
            expected.sort_by_key(|name| cookie_of(name));
            assert_eq!(names(&directory, 0), expected);
            for (number, name) in all.iter().enumerate() {
                assert!(!directory.is_empty());
                assert_eq!(directory.get(name), Some(Ino(number as u64)));
                assert_eq!(directory.remove(name), Some(Ino(number as u64)));
                assert_eq!(directory.remove(name), None);
            }
            assert!(directory.is_empty());
        }
    }
    #[test]
    fn a_listing_survives_changes() {
        let mut directory = Directory::new(Ino::ROOT);
        for index in 0..100_u64 {
            directory.insert(format!("name {index}").as_bytes(), Ino(index + 10));
        }
        let rows: Vec<_> = directory
            .after(0)
            .map(|(cookie, name, ino)| (cookie, name.to_vec(), ino))
            .collect();
        let (seen, rest) = rows.split_at(50);
        // Half of what was seen and of what was not goes; one of each comes back.
        for (index, (_, name, _)) in rows.iter().enumerate().filter(|(i, _)| i % 2 == 0) {
            directory.remove(name);
            if index == 2 || index == 98 {
                directory.insert(name, Ino(1000));
            }
        }
        let stayed = rest.iter().enumerate();
        let stayed = stayed.filter(|(index, _)| index % 2 == 1 || *index == 48);
        let expected: Vec<_> = stayed.map(|(_, (_, name, _))| name.clone()).collect();
        assert_eq!(names(&directory, seen[49].0), expected);
    }

    #[test]
    fn a_listing_goes_on_in_another_daemon() {
        let [mut first, mut second] = [Directory::new(Ino::ROOT), Directory::new(Ino::ROOT)];
        let names_of = |index: u64| format!("name {index}").into_bytes();
        for index in 0..100 {
            first.insert(&names_of(index), Ino(index + 10));
            second.insert(&names_of(99 - index), Ino(99 - index + 10));
        }
        let middle = first.after(0).nth(40).map(|(cookie, ..)| cookie);
        let middle = middle.expect("100 names");
        assert_eq!(names(&first, middle), names(&second, middle));
        assert_eq!(names(&first, middle).len(), 59);
    }

    #[test]
    fn cookies_fit_the_kernel() {
        for index in 0..10_000 {
            let cookie = cookie_of(format!("{index}").as_bytes());
            assert!((FIRST_COOKIE..=LAST_COOKIE).contains(&cookie));
        }
    }
}
