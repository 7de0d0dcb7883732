//! Makes one stream of events out of the watches of several namespaces, such that one cache can follow it.
//!
//! A watch that begins anew sends Init, its objects, InitDone, and a cache drops what was not among them. Joined, that would drop the
//! objects of all other namespaces. So there is one Init sequence, sent when every namespace has been listed once; after it, a
//! namespace that begins anew becomes plain changes, and what vanished meanwhile becomes deletions.

use kube::Resource;
use kube::runtime::reflector::{Lookup, ObjectRef};
use kube::runtime::watcher::Event;
use std::collections::HashSet;
use std::sync::Arc;

/// State of the joined watches.
pub struct Join<K: Resource<DynamicType = ()> + Clone + 'static> {
    parts: Vec<Part<K>>,
    begun: bool,
}

enum Part<K: Resource<DynamicType = ()> + Clone + 'static> {
    /// First list, with what it has brought.
    Listing(Vec<K>),
    /// First list complete, others are not.
    Listed(Vec<K>),
    /// Changes pass; while it begins anew, what was seen since.
    Following(Option<HashSet<ObjectRef<K>>>),
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> Join<K> {
    /// Joins `count` watches.
    pub fn new(count: usize) -> Self {
        Self { parts: (0..count).map(|_| Part::Listing(Vec::new())).collect(), begun: false }
    }

    /// What the cache is to see after an event of watch `number`. `known` reads the cache's objects of that watch.
    pub fn take(&mut self, number: usize, event: Event<K>, known: impl FnOnce() -> Vec<Arc<K>>) -> Vec<Event<K>> {
        let Some(part) = self.parts.get_mut(number) else {
            return Vec::new();
        };
        match part {
            Part::Listing(objects) => match event {
                Event::Init => objects.clear(),
                Event::InitApply(object) | Event::Apply(object) => objects.push(object),
                Event::InitDone => *part = Part::Listed(std::mem::take(objects)),
                Event::Delete(_) => {}
            },
            Part::Listed(objects) => match event {
                Event::Init => *part = Part::Listing(Vec::new()),
                Event::Apply(object) | Event::InitApply(object) => objects.push(object),
                Event::Delete(object) => objects.retain(|other| other.to_object_ref(()) != object.to_object_ref(())),
                Event::InitDone => {}
            },
            Part::Following(seen) => return follow(seen, event, known),
        }
        self.begin()
    }

    /// The one Init sequence, once all have been listed.
    fn begin(&mut self) -> Vec<Event<K>> {
        if self.begun || self.parts.iter().any(|part| !matches!(part, Part::Listed(_))) {
            return Vec::new();
        }
        self.begun = true;
        let mut events = vec![Event::Init];
        for part in &mut self.parts {
            if let Part::Listed(objects) = std::mem::replace(part, Part::Following(None)) {
                events.extend(objects.into_iter().map(Event::InitApply));
            }
        }
        events.push(Event::InitDone);
        events
    }
}

fn follow<K: Resource<DynamicType = ()> + Clone>(
    seen: &mut Option<HashSet<ObjectRef<K>>>,
    event: Event<K>,
    known: impl FnOnce() -> Vec<Arc<K>>,
) -> Vec<Event<K>> {
    match event {
        Event::Init => {
            *seen = Some(HashSet::new());
            Vec::new()
        }
        Event::InitApply(object) => {
            if let Some(seen) = seen {
                seen.insert(object.to_object_ref(()));
            }
            vec![Event::Apply(object)]
        }
        Event::InitDone => {
            let Some(seen) = seen.take() else { return Vec::new() };
            let vanished = known().into_iter().filter(|object| !seen.contains(&object.to_object_ref(())));
            vanished.map(|object| Event::Delete((*object).clone())).collect()
        }
        change @ (Event::Apply(_) | Event::Delete(_)) => vec![change],
    }
}

#[cfg(test)]
mod tests {
    use super::Join;
    use k8s_openapi::api::core::v1::ConfigMap;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
    use kube::ResourceExt as _;
    use kube::runtime::reflector::store::Writer;
    use kube::runtime::watcher::Event::{self, Apply, Delete, Init, InitApply, InitDone};

    fn object(namespace: &str, name: &str) -> ConfigMap {
        ConfigMap {
            metadata: ObjectMeta { namespace: Some(namespace.into()), name: Some(name.into()), ..ObjectMeta::default() },
            ..ConfigMap::default()
        }
    }

    struct World {
        join: Join<ConfigMap>,
        writer: Writer<ConfigMap>,
    }

    impl World {
        fn new() -> Self {
            Self { join: Join::new(2), writer: Writer::default() }
        }

        /// Feeds watch `a` (0) or `b` (1).
        fn feed(&mut self, namespace: &str, event: Event<ConfigMap>) {
            let store = self.writer.as_reader();
            let known = || store.state().into_iter().filter(|object| object.namespace().as_deref() == Some(namespace)).collect();
            for event in self.join.take(usize::from(namespace == "b"), event, known) {
                self.writer.apply_watcher_event(&event);
            }
        }

        fn names(&self) -> Vec<String> {
            let mut names: Vec<_> = self.writer.as_reader().state().iter().map(|object| object.name_any()).collect();
            names.sort();
            names
        }
    }

    #[test]
    fn nothing_is_shown_before_every_namespace_has_been_listed() {
        let mut world = World::new();
        for event in [Init, InitApply(object("a", "a1")), InitDone, Apply(object("a", "a2"))] {
            world.feed("a", event);
        }
        assert!(world.names().is_empty());
        // A list that breaks off is begun anew.
        for event in [Init, InitApply(object("b", "gone")), Init, InitApply(object("b", "b1")), InitDone] {
            world.feed("b", event);
        }
        assert_eq!(world.names(), ["a1", "a2", "b1"]);
    }

    #[test]
    fn a_namespace_that_begins_anew_leaves_the_others_alone_and_loses_what_vanished() {
        let mut world = World::new();
        for namespace in ["a", "b"] {
            world.feed(namespace, Init);
            for number in 1..=2 {
                world.feed(namespace, InitApply(object(namespace, &format!("{namespace}{number}"))));
            }
            world.feed(namespace, InitDone);
        }
        for event in [Init, InitApply(object("a", "a2")), InitApply(object("a", "a3")), InitDone] {
            world.feed("a", event);
        }
        assert_eq!(world.names(), ["a2", "a3", "b1", "b2"]);
        world.feed("b", Delete(object("b", "b1")));
        assert_eq!(world.names(), ["a2", "a3", "b2"]);
    }
}
