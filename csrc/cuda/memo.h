// What a function of plain bytes gave before: descriptions of tensors depend on nothing but the numbers that they were
// made from, so one that was made once stays right whatever has become of the memory that it names.
#pragma once

#include <cstddef>
#include <cstring>
#include <string>
#include <type_traits>
#include <unordered_map>

namespace lowbit::cuda {

// Results by the bytes of their keys, which have no padding; all are forgotten when there are too many.
template <class Key, class Value, size_t kMost = 1 << 14>
class Memo {
 public:
  static_assert(std::has_unique_object_representations_v<Key>);

  template <class Make>
  const Value& find(const Key& key, const Make& make) {
    std::string bytes(sizeof(Key), '\0');
    std::memcpy(bytes.data(), &key, sizeof(Key));
    if (const auto found = known_.find(bytes); found != known_.end()) return found->second;
    Value made = make();
    if (known_.size() >= kMost) known_.clear();
    return known_.emplace(std::move(bytes), made).first->second;
  }
  size_t size() const { return known_.size(); }

 private:
  std::unordered_map<std::string, Value> known_;
};

}  // namespace lowbit::cuda
