// Reads the lengths of step and fits: the exact types first, which cost least; whatever else, Python turns into one of them.
#include <nanobind/stl/string.h>

#include "bindings/bindings.hpp"

std::int64_t to_int64(nb::handle value, const char* parameter) {
  if (PyLong_CheckExact(value.ptr()) == 0) {
    if (PyBool_Check(value.ptr()) || PyIndex_Check(value.ptr()) == 0) {
      throw nb::type_error((std::string(parameter) + "=" + nb::repr(value).c_str() + " must be an int, not " +
                            nb::cast<std::string>(value.type().attr("__name__")))
                               .c_str());
    }
    const nb::object index = nb::steal(PyNumber_Index(value.ptr()));
    if (!index.is_valid()) throw nb::python_error();
    return to_int64(index, parameter);
  }
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  if (overflow != 0) {
    PyErr_Format(PyExc_OverflowError, "%s=%R does not fit in 64 bits", parameter, value.ptr());
    throw nb::python_error();
  }
  return number;
}

Lengths to_lengths(nb::handle value) {
  Lengths lengths;
  if (PyDict_Check(value.ptr())) {
    lengths.kind = Lengths::Kind::kNamed;
    PyObject* slot = nullptr;
    PyObject* tokens = nullptr;
    Py_ssize_t position = 0;
    // A copy of the items first: __index__ of a key may run Python code that changes the mapping.
    std::vector<std::pair<nb::object, nb::object>> items;
    while (PyDict_Next(value.ptr(), &position, &slot, &tokens) != 0) items.emplace_back(nb::borrow(slot), nb::borrow(tokens));
    for (const auto& [key, item] : items) lengths.named.push_back({to_int64(key, "slot"), to_int64(item, "length")});
    return lengths;
  }
  const bool is_list = PyList_CheckExact(value.ptr()) != 0;
  if (is_list || PyTuple_CheckExact(value.ptr()) != 0) {
    lengths.kind = Lengths::Kind::kSequence;
    const nb::sequence items = nb::borrow<nb::sequence>(value);
    lengths.numbers.reserve(nb::len(items));
    for (nb::handle item : items) lengths.numbers.push_back(to_int64(item, "length"));
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
