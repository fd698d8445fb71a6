// Reads the lengths of step and fits: the exact types first, which cost least; whatever else, Python turns into one of them.

#include "bindings/bindings.hpp"

namespace {

/// Reads an int of 64 bits. False for everything else, which Python reads, or names in its error.
bool read(nb::handle value, std::int64_t& number) {
  if (PyLong_CheckExact(value.ptr()) == 0) return false;
  int overflow = 0;
  number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  return overflow == 0;
}

}  // namespace

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
  const bool is_list = PyList_CheckExact(value.ptr()) != 0;
  if (is_list || PyTuple_CheckExact(value.ptr()) != 0) {
    lengths.kind = Lengths::Kind::kSequence;
    const nb::sequence items = nb::borrow<nb::sequence>(value);
    lengths.numbers.reserve(nb::len(items));
    for (nb::handle item : items) {
      std::int64_t number = 0;
      if (!read(item, number)) return Lengths{};
      lengths.numbers.push_back(number);
    }
    lengths.sequence = lengths.numbers;
    return lengths;
  }
  if (!nb::try_cast(value, lengths.array, false)) return lengths;
  lengths.kind = Lengths::Kind::kSequence;
  const std::size_t count = lengths.array.shape(0);
  if (count <= 1 || lengths.array.stride(0) == 1) {
    lengths.sequence = {lengths.array.data(), count};
    return lengths;
  }
  lengths.numbers.reserve(count);
  for (std::size_t i = 0; i < count; ++i) lengths.numbers.push_back(lengths.array(i));
  lengths.sequence = lengths.numbers;
  return lengths;
}
