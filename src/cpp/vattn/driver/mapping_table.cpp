#include "vattn/driver/mapping_table.hpp"

#include <sstream>
#include <string>

namespace vattn {
namespace {

template <typename... Parts>
[[noreturn]] void refuse(const char* verb, const Parts&... parts) {
  std::ostringstream text;
  text << verb << ": ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

std::string hex(std::uint64_t value) {
  std::ostringstream text;
  text << "0x" << std::hex << value;
  return text.str();
}

bool leaves(const MappingTable::Range& range, Address at, std::size_t size) {
  return at < range.base || at - range.base > range.size || size > range.size - (at - range.base);
}

}  // namespace

void MappingTable::check_size(const char* verb, std::size_t size) const {
  if (size == 0 || size % granularity_ != 0) {
    refuse(verb, "size ", size, " must be a multiple of the granularity, ", granularity_, ", and not 0");
  }
}

const MappingTable::Range* MappingTable::find(Address at) const noexcept {
  auto it = ranges_.upper_bound(at);
  if (it == ranges_.begin()) return nullptr;
  --it;
  return at - it->first < it->second.size ? &it->second : nullptr;
}

bool MappingTable::touches(Address at, std::size_t size) const noexcept {
  if (find(at) != nullptr) return true;
  const auto next = ranges_.upper_bound(at);
  return next != ranges_.end() && next->first - at < size;
}

MappingTable::Range* MappingTable::find(Address at) noexcept {
  return const_cast<Range*>(static_cast<const MappingTable*>(this)->find(at));
}

const MappingTable::Page* MappingTable::page(PageHandle page) const noexcept {
  const auto it = pages_.find(page);
  return it != pages_.end() ? &it->second : nullptr;
}

void MappingTable::note_reserve(Address base, std::size_t size, UnmappedReads reads, std::uint64_t window) {
  ranges_.emplace(base, Range{base, size, reads, window, 0, {}});
}

void MappingTable::check_release_range(Address base, std::size_t size) const {
  const auto it = ranges_.find(base);
  if (it == ranges_.end()) refuse("release_range", hex(base), " is not the start of a reservation");
  if (it->second.size != size) {
    refuse("release_range", "size ", size, " is not the ", it->second.size, " bytes that were reserved at ", hex(base));
  }
  if (!it->second.mapped.empty()) {
    refuse("release_range", it->second.mapped.size(), " mappings are still in the reservation at ", hex(base),
           ": unmap them first");
  }
}

void MappingTable::note_release_range(Address base) { ranges_.erase(base); }

void MappingTable::note_create(PageHandle page, std::size_t size) { pages_.emplace(page, Page{size, 0, true}); }

void MappingTable::check_release(PageHandle page) const {
  const auto it = pages_.find(page);
  if (it == pages_.end() || !it->second.referenced) refuse("release", "page ", page, " does not exist, or was released before");
}

bool MappingTable::note_release(PageHandle page) {
  const auto it = pages_.find(page);
  it->second.referenced = false;
  if (it->second.mappings != 0) return false;
  pages_.erase(it);
  return true;
}

MappingTable::Place MappingTable::check_map(Address at, std::size_t size, PageHandle page) {
  const auto found = pages_.find(page);
  if (found == pages_.end() || !found->second.referenced) refuse("map", "page ", page, " does not exist, or was released");
  if (found->second.size != size) refuse("map", "size ", size, " is not the page's ", found->second.size, ": whole pages only");
  Range* range = find(at);
  if (range == nullptr) refuse("map", "address ", hex(at), " is in no reservation");
  if ((at - range->base) % granularity_ != 0) refuse("map", "address ", hex(at), " is not on the granularity, ", granularity_);
  if (leaves(*range, at, size)) refuse("map", hex(at), " + ", size, " leaves its reservation");
  const auto next = range->mapped.lower_bound(at);
  const bool over_next = next != range->mapped.end() && next->first - at < size;
  bool over_previous = false;
  if (next != range->mapped.begin()) {
    const auto previous = std::prev(next);
    over_previous = at - previous->first < previous->second.size;
  }
  if (over_next || over_previous) refuse("map", "address ", hex(at), " is mapped already");
  return {range, next, &found->second};
}

void MappingTable::note_map(const Place& place, Address at, std::size_t size, PageHandle page) {
  place.range->mapped.emplace_hint(place.next, at, Mapping{size, page});
  ++place.page->mappings;
}

void MappingTable::check_mapped(const char* verb, Address at, std::size_t size) const {
  if (size == 0) refuse(verb, "size 0");
  const Range* range = find(at);
  if (range == nullptr || leaves(*range, at, size)) refuse(verb, hex(at), " + ", size, " is not inside one reservation");
  auto it = range->mapped.upper_bound(at);
  if (it != range->mapped.begin()) --it;
  Address reached = at;
  for (; it != range->mapped.end() && reached - at < size; ++it) {
    if (it->first > reached) break;
    const Address end = it->first + it->second.size;
    if (end > reached) reached = end;
  }
  if (reached - at < size) refuse(verb, "nothing is mapped at ", hex(reached));
}

const MappingTable::Range& MappingTable::check_unmap(Address at, std::size_t size) const {
  check_mapped("unmap", at, size);
  const Range* range = find(at);
  const auto last = std::prev(range->mapped.lower_bound(at + size));
  if (range->mapped.find(at) == range->mapped.end() || last->first + last->second.size != at + size) {
    refuse("unmap", hex(at), " + ", size, " cuts a mapping: whole mappings only");
  }
  return *range;
}

}  // namespace vattn
