//! A bounded cache of two generations: what was not used while the young one filled goes.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;

struct Generations<K, V> {
    young: HashMap<K, Arc<V>>,
    old: HashMap<K, Arc<V>>,
    young_bytes: usize,
}

/// Values by key, at most about `bytes_max` of them as counted by the caller.
pub(crate) struct Cache<K, V> {
    shards: Vec<Mutex<Generations<K, V>>>,
    shard_bytes_max: usize,
}

impl<K: Hash + Eq + Copy, V> Cache<K, V> {
    pub(crate) fn new(bytes_max: usize, shards: usize) -> Self {
        let empty = || {
            let generations = Generations {
                young: HashMap::new(),
                old: HashMap::new(),
                young_bytes: 0,
            };
            Mutex::new(generations)
        };
        Self {
            shards: (0..shards).map(|_| empty()).collect(),
            shard_bytes_max: bytes_max / shards / 2,
        }
    }

    fn shard(&self, key: &K) -> &Mutex<Generations<K, V>> {
        use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(key);
        let place = usize::try_from(hash % self.shards.len() as u64).unwrap_or(0);
        &self.shards[place]
    }

    pub(crate) fn get(&self, key: &K, bytes: impl Fn(&V) -> usize) -> Option<Arc<V>> {
        let mut shard = self.shard(key).lock();
        if let Some(value) = shard.young.get(key) {
            return Some(Arc::clone(value));
        }
        let value = shard.old.remove(key)?;
        self.put(&mut shard, *key, Arc::clone(&value), bytes(&value));
        Some(value)
    }

    pub(crate) fn insert(&self, key: K, value: Arc<V>, bytes: usize) {
        let mut shard = self.shard(&key).lock();
        self.put(&mut shard, key, value, bytes);
    }

    fn put(&self, shard: &mut Generations<K, V>, key: K, value: Arc<V>, bytes: usize) {
        if shard.young_bytes + bytes > self.shard_bytes_max {
            shard.old = core::mem::take(&mut shard.young);
            shard.young_bytes = 0;
        }
        shard.young_bytes += bytes;
        shard.young.insert(key, value);
    }

    pub(crate) fn forget(&self, key: &K) {
        let mut shard = self.shard(key).lock();
        shard.young.remove(key);
        shard.old.remove(key);
    }
}
