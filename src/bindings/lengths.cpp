// Reads the lengths of step and fits, and slots and positions: the exact types first, which cost least; whatever else, Python
// turns into one of them.

#include "bindings/bindings.hpp"

namespace {

/// Reads an int of 64 bits. False for everything else, which Python reads, or names in its error.
bool read(nb::handle value, std::int64_t& number) {
  if (PyLong_CheckExact(value.ptr()) == 0) return false;
  int overflow = 0;
  number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  return overflow == 0;
}

template <typename Int>
void widen(const Numbers& from, std::vector<std::int64_t>& to) {
  const auto* const first = static_cast<const Int*>(from.array.data());
  for (std::size_t i = 0; i < from.array.shape(0); ++i)
    to.push_back(first[static_cast<std::int64_t>(i) * from.array.stride(0)]);
}

}  // namespace

bool to_numbers(nb::handle value, Numbers& numbers) {
  if (PyList_CheckExact(value.ptr()) != 0 || PyTuple_CheckExact(value.ptr()) != 0) {
    const nb::sequence items = nb::borrow<nb::sequence>(value);
    numbers.copied.reserve(nb::len(items));
    for (nb::handle item : items) {
      std::int64_t number = 0;
      if (!read(item, number)) return false;
      numbers.copied.push_back(number);
    }
    numbers.values = numbers.copied;
    return true;
  }
  if (!nb::try_cast(value, numbers.array, false)) return false;
  const bool is_wide = numbers.array.dtype() == nb::dtype<std::int64_t>();
  if (!is_wide && numbers.array.dtype() != nb::dtype<std::int32_t>()) return false;
  const std::size_t count = numbers.array.shape(0);
  if (is_wide && (count <= 1 || numbers.array.stride(0) == 1)) {
    numbers.values = {static_cast<const std::int64_t*>(numbers.array.data()), count};
    return true;
  }
  numbers.copied.reserve(count);
  is_wide ? widen<std::int64_t>(numbers, numbers.copied) : widen<std::int32_t>(numbers, numbers.copied);
  numbers.values = numbers.copied;
  return true;
}

Lengths to_lengths(nb::handle value) {
  Lengths lengths;
  if (value.is_none()) return lengths;
  if (PyDict_Check(value.ptr())) {
    lengths.kind = Lengths::Kind::kNamed;
    PyObject* slot = nullptr;
    PyObject* tokens = nullptr;
    Py_ssize_t position = 0;
    while (PyDict_Next(value.ptr(), &position, &slot, &tokens) != 0) {
      vattn::SlotLength entry{};
      if (!read(slot, entry.slot) || !read(tokens, entry.tokens)) return Lengths{};
      lengths.named.push_back(entry);
    }
    return lengths;
  }
  if (to_numbers(value, lengths.sequence)) lengths.kind = Lengths::Kind::kSequence;
  return lengths;
}
